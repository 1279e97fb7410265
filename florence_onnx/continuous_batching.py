"""Prompts of any callers decoded together: whoever is done leaves, whoever waits enters, at every step.

There is no thread of its own: of the threads that wait for answers, one at a time drives the decoder for all.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from florence_onnx.device_memory import DeviceArray
from florence_onnx.errors import DeviceMemoryError, FlorenceError
from florence_onnx.prompt_rows import PromptRows
from florence_onnx.scores import Ids, TopScores
from florence_onnx.search import GeneratedSequence, Search

SHRINK_AFTER = 256
"""Prompts in a row that would fit shorter buffers, after which those are taken: new buffers mean new CUDA graphs."""
_log = logging.getLogger("florence_onnx")


class PlacedDecoder(Protocol):
    """What steps prompts in places; see `resident_decoder.ResidentDecoder`."""

    @property
    def places(self) -> int: ...

    @property
    def text_length(self) -> int: ...

    def padded_length(self, num_tokens: int) -> int: ...

    def open(self, num_places: int, text_length: int) -> None: ...

    def widen(self, num_places: int) -> None: ...

    def add(self, prompt_ids: Ids, features: DeviceArray) -> int: ...

    def remove(self, place: int) -> None: ...

    def rows(self, place: int) -> PromptRows: ...

    def step(self, token_ids: Mapping[int, Ids]) -> dict[int, TopScores]: ...


class Job:
    """One prompt on its way to an answer."""

    def __init__(self, prompt_ids: Ids, features: DeviceArray, search: Search) -> None:
        """Args:
        prompt_ids: `(T,)`.
        features: `(N, D)` on the decoder's device.
        search: Of one prompt.
        """
        self.prompt_ids = prompt_ids
        self.features = features
        self.search = search
        self.is_started = False
        self.next_tokens: Ids = search.start()
        self.is_done = False
        self.error: BaseException | None = None

    def result(self) -> GeneratedSequence:
        """The answer of a job that is done.

        Raises:
            FlorenceError: There is none.
        """
        if isinstance(self.error, FlorenceError):
            raise type(self.error)(*self.error.args) from self.error  # one error may be many jobs': each raises its own
        if self.error is not None:
            raise RuntimeError("the thread that drove this batch was stopped") from self.error
        return self.search.results()[0]


class ContinuousBatch:
    """The jobs in the places of a decoder, and those that wait for one."""

    def __init__(self, decoder: PlacedDecoder, max_batch: int, device: AbstractContextManager[object]) -> None:
        """Args:
        decoder: Used by this object alone.
        max_batch: Most prompts in flight.
        device: Held while the device works.
        """
        self._decoder = decoder
        self._max_batch = max_batch
        self._device = device
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._is_driven = False
        self._num_shorter = 0

    @property
    def num_in_flight(self) -> int:
        """Jobs that have a place."""
        return len(self._running)

    def submit(self, job: Job) -> None:
        """Lets a job wait for a place; some thread must `wait`."""
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()

    def discard(self, jobs: Sequence[Job]) -> None:
        """Ends jobs whose answers nobody wants any more."""
        with self._changed:
            for job in jobs:
                job.is_done = True
            self._waiting = deque(job for job in self._waiting if not job.is_done)

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Drives the decoder, or lets another thread do so, until a condition holds that jobs bring about.

        Args:
            is_over: Asked whenever jobs were submitted or ended.
        """
        with self._changed:
            while not is_over():
                if self._is_driven or not (self._waiting or self._running):
                    self._changed.wait()
                    continue
                self._is_driven = True
                try:
                    self._drive(is_over)
                finally:
                    self._is_driven = False
                    self._changed.notify_all()

    def notify(self) -> None:
        """Makes those who wait ask their conditions again."""
        with self._changed:
            self._changed.notify_all()

    # ---------------------------------------------------------------------------------- by the thread that drives

    def _drive(self, is_over: Callable[[], bool]) -> None:
        """Steps, without the lock, while there is something to do for the caller; called and left with the lock."""
        while (self._waiting or self._running) and not is_over():
            self._changed.release()
            try:
                has_ended = self._step_or_fail()
            finally:
                self._changed.acquire()
            if has_ended:
                self._changed.notify_all()

    def _step_or_fail(self) -> bool:
        try:
            return self._step()
        except FlorenceError as error:
            self._fail_running(error)
            return True
        except BaseException as error:
            self._fail_running(error)
            raise

    def _fail_running(self, error: BaseException) -> None:
        for place, job in list(self._running.items()):
            self._end(place, job, error)

    def _end(self, place: int, job: Job, error: BaseException | None = None) -> None:
        self._decoder.remove(place)
        del self._running[place]
        job.error, job.is_done = error, True

    def _step(self) -> bool:
        """Fills free places, feeds every prompt, takes every search further; returns whether a job ended."""
        for place, job in list(self._running.items()):
            if job.is_done:  # discarded
                self._end(place, job)
        with self._device:
            has_ended = self._admit()
            if not self._running:
                return has_ended
            found = self._decoder.step({place: job.next_tokens for place, job in self._running.items()})
        for place, job in list(self._running.items()):
            has_ended |= self._advance(place, job, found[place])
        return has_ended

    def _advance(self, place: int, job: Job, scores: TopScores) -> bool:
        continuation = job.search.advance(scores if job.is_started else scores.last_place())
        job.is_started = True
        if continuation is None:
            self._end(place, job)
            return True
        rows = self._decoder.rows(place)
        if continuation.kept is not None:
            rows.keep(continuation.kept)
        rows.reorder(continuation.rows)
        job.next_tokens = continuation.token_ids
        return False

    # ------------------------------------------------------------------------------------------------- admission

    def _admit(self) -> bool:
        """Gives places to waiting jobs, in their order; returns whether one failed at that."""
        has_failed = False
        while (job := self._next()) is not None:
            try:
                if not self._make_room(job):
                    return has_failed
                place = self._decoder.add(job.prompt_ids, job.features)
            except FlorenceError as error:
                job.error, job.is_done = error, True
                has_failed = True
            else:
                self._running[place] = job
            with self._changed:
                if self._waiting and self._waiting[0] is job:
                    self._waiting.popleft()
        return has_failed

    def _next(self) -> Job | None:
        with self._changed:
            return self._waiting[0] if self._waiting and len(self._running) < self._max_batch else None

    def _make_room(self, job: Job) -> bool:
        """Whether there is a place for a job, or can be one now."""
        decoder = self._decoder
        length = decoder.padded_length(len(job.prompt_ids))
        self._num_shorter = self._num_shorter + 1 if length < decoder.text_length else 0
        if not self._running:
            self._open(length)
            return True
        if length > decoder.text_length:
            return False  # its turn comes when all places are free
        return len(self._running) < decoder.places or self._widen()

    def _open(self, length: int) -> None:
        """Makes places while none is in use: as many as are waited for, and never fewer than there are."""
        decoder = self._decoder
        with self._changed:
            lengths = [decoder.padded_length(len(job.prompt_ids)) for job in self._waiting][: self._max_batch]
        length = max([length, *lengths])
        if self._num_shorter < SHRINK_AFTER:
            length = max(length, decoder.text_length)
        places = max(decoder.places, min(self._max_batch, _power_of_two(len(lengths))))
        while True:
            try:
                return decoder.open(places, length)
            except DeviceMemoryError as error:
                if places == 1:
                    raise
                places = self._narrow(places // 2, error)

    def _widen(self) -> bool:
        """More places beside those in use; False where the memory does not allow it."""
        places = min(self._max_batch, 2 * self._decoder.places)
        try:
            self._decoder.widen(places)
        except DeviceMemoryError as error:
            self._narrow(self._decoder.places, error)
            return False
        return True

    def _narrow(self, places: int, error: DeviceMemoryError) -> int:
        self._max_batch = places
        _log.warning("no more than %d prompts at a time from now on: %s", places, error)
        return places


def _power_of_two(count: int) -> int:
    """The least that is not below."""
    return 1 << (max(1, count) - 1).bit_length()
