"""The loop over rounds, targets and calls; calls that have ended in an earlier process are skipped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from florence_onnx.bench_fal.budget import BudgetSpentError
from florence_onnx.bench_fal.journal import Finished, Journal, without_image
from florence_onnx.bench_fal.plan import Call
from florence_onnx.bench_fal.rate_limit import Clock
from florence_onnx.bench_fal.targets import Reply, Target
from florence_onnx.bench_fal.transport import CallFailedError

MAX_FAILURES = 5
"""Consecutive failures, of the kind that can go away, after which a target is skipped."""
_REFUSALS = (401, 402, 403)
"""Statuses that all further calls would get too, after which a target is skipped."""

Progress = Callable[[str], None]
"""Called with a line for each call."""


class Runner:
    """Makes the calls of a comparison in this process."""

    def __init__(self, targets: Sequence[Target], journal: Journal, clock: Clock, progress: Progress) -> None:
        """Calls nothing yet.

        Args:
            targets: The targets, in their order within a round.
            journal: Has the calls that have ended, and records the new ones.
            clock: Measures the times.
            progress: Called with a line for each call.
        """
        self.stopped: dict[str, str] = {}
        """Targets (by name) that were skipped before the end, and the reasons."""
        self._targets = targets
        self._journal = journal
        self._clock = clock
        self._progress = progress
        self._warm: set[str] = set()
        self._num_failures = {target.name: 0 for target in targets}

    def run(self, plan: Sequence[Call]) -> None:
        """Makes all calls that have not ended."""
        for _, calls in itertools.groupby(plan, key=lambda call: call.repeat):
            in_round = list(calls)
            for target in self._targets:
                self._ask_all(target, in_round)

    def _ask_all(self, target: Target, calls: Sequence[Call]) -> None:
        for call in outstanding(calls, target, self._journal):
            if target.name in self.stopped:
                return
            try:
                target.prepare(call)
            except BudgetSpentError as error:
                self._stop(target, str(error))
                return
            self._update(target, self._ask(target, call))

    def _ask(self, target: Target, call: Call) -> Finished:
        error, start = None, self._clock.monotonic()
        try:
            reply = target.ask(call)
        except CallFailedError as failure:
            error, reply = str(failure) or "an error without a message", Reply(None, failure.status, failure.headers)
        seconds = self._clock.monotonic() - start
        finished = Finished(
            call=call.id,
            target=target.identity,
            task=call.task.slug,
            image=call.image.name,
            status=reply.status,
            seconds=seconds,
            is_cold=target.name not in self._warm,
            when=self._clock.now().isoformat(timespec="microseconds"),
            answer=without_image(reply.answer),
            error=None if error is None else self._journal.redact(error),
            headers=reply.headers,
        )
        self._journal.write_finished(finished)
        outcome = finished.error or f"{seconds:.3f} s{' (cold)' if finished.is_cold else ''}"
        self._progress(f"{target.name}: {call.task.slug} of {call.image.name}, repeat {call.repeat + 1}: {outcome}")
        return finished

    def _update(self, target: Target, finished: Finished) -> None:
        """Counts failures in a row, and stops a target that has too many or refuses the key."""
        if finished.error is None:
            self._warm.add(target.name)
            self._num_failures[target.name] = 0
            return
        if finished.status in _REFUSALS:
            self._stop(target, f"it rejects the key or the account with {finished.status}: {finished.error}")
        if finished.is_final:  # the arguments were rejected, which says nothing about the target
            return
        self._num_failures[target.name] += 1
        if self._num_failures[target.name] >= MAX_FAILURES:
            self._stop(target, f"{MAX_FAILURES} calls in a row failed, the last with: {finished.error}")

    def _stop(self, target: Target, reason: str) -> None:
        if target.name not in self.stopped:
            self.stopped[target.name] = reason
            self._progress(f"{target.name}: stopped: {reason}")


def outstanding(plan: Sequence[Call], target: Target, journal: Journal) -> list[Call]:
    """Returns the calls that a target still has to answer: never made, or failed in a way that can go away."""
    return [call for call in plan if not _is_finished(journal.find(call, target.identity))]


def _is_finished(finished: Finished | None) -> bool:
    return finished is not None and finished.is_final
