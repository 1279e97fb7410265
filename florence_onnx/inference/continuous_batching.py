"""Prompts of any callers decoded together: whoever is done leaves, whoever waits enters, at every step.

One thread does all that a device is asked for: ONNX Runtime keeps the CUDA graphs that a thread captured for that thread alone, so
that in each of several all would be captured anew.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from florence_onnx.errors import DeviceMemoryError, FlorenceError, ProviderError
from florence_onnx.generation.scores import Ids, TopScores
from florence_onnx.generation.search import GeneratedSequence, Search
from florence_onnx.inference.decoder_call import padded_count
from florence_onnx.inference.slot_table import PromptRows
from florence_onnx.runtime.device_memory import DeviceArray

SHRINK_AFTER = 256
"""Prompts in a row that would fit shorter buffers, after which those are taken: new buffers mean new CUDA graphs."""
T = TypeVar("T")
_log = logging.getLogger("florence_onnx")


class PlacedDecoder(Protocol):
    """What steps prompts in places; see `resident_decoder.ResidentDecoder`."""

    @property
    def places(self) -> int: ...

    @property
    def text_length(self) -> int: ...

    def padded_length(self, num_tokens: int) -> int: ...

    def open(self, num_places: int, text_length: int) -> None: ...

    def close(self) -> None: ...

    def widen(self, num_places: int) -> None: ...

    def add(self, prompt_ids: Ids, features: DeviceArray) -> int: ...

    def remove(self, place: int) -> None: ...

    def rows(self, place: int) -> PromptRows: ...

    def step(self, token_ids: Mapping[int, Ids]) -> dict[int, TopScores]: ...


class Job:
    """One prompt on its way to an answer."""

    def __init__(self, prompt_ids: Ids, features: DeviceArray, new_search: Callable[[], Search]) -> None:
        """Args:
        prompt_ids: `(T,)`.
        features: `(N, D)` on the decoder's device.
        new_search: Makes a search of one prompt.
        """
        self.prompt_ids = prompt_ids
        self.features = features
        self._new_search = new_search
        self.is_done = False
        self.error: BaseException | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets what was found of the answer."""
        self.search = self._new_search()
        self.is_started = False
        self.next_tokens: Ids = self.search.start()

    def result(self) -> GeneratedSequence:
        """The answer of a job that is done.

        Raises:
            FlorenceError: There is none.
        """
        if isinstance(self.error, FlorenceError):
            raise type(self.error)(*self.error.args) from self.error  # one error may be many jobs': each raises its own
        if self.error is not None:
            raise RuntimeError(f"decoding failed: {self.error}") from self.error
        return self.search.results()[0]


class ContinuousBatch:
    """The jobs in the places of a decoder, those that wait for one, and the thread that works for them."""

    def __init__(self, decoder: PlacedDecoder, max_batch: int) -> None:
        """Args:
        decoder: Used by this object alone.
        max_batch: Most prompts in flight.
        """
        self._decoder = decoder
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._is_open = True
        self._num_shorter = 0
        # a daemon: an interpreter that ends does not wait for it, and `close` ends it before
        self._thread = threading.Thread(target=self._work, name="florence-device", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, after what it does now; jobs that have no answer yet fail."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def submit(self, job: Job) -> None:
        """Lets a job wait for a place.

        Raises:
            ProviderError: The thread has ended.
        """
        with self._changed:
            self._check_open()
            self._waiting.append(job)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ProviderError("this model is closed: its device failed; load it again")

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function in the thread that has the device, between two steps.

        Returns:
            What it returns.

        Raises:
            BaseException: What it raises.
            ProviderError: The thread has ended.
        """
        from concurrent.futures import Future

        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - raised by whoever waits for the result
                future.set_exception(error)

        with self._changed:
            self._check_open()
            self._calls.append(run)
            self._changed.notify_all()
        return future.result()

    def discard(self, jobs: Sequence[Job]) -> None:
        """Ends jobs whose answers nobody wants any more."""
        with self._changed:
            for job in jobs:
                job.is_done = True
            self._waiting = deque(job for job in self._waiting if not job.is_done)

    def wait(self, is_over: Callable[[], bool]) -> None:
        """Returns when a condition holds that jobs bring about; it is asked whenever some have ended, and at `notify`."""
        with self._changed:
            self._changed.wait_for(is_over)

    def notify(self) -> None:
        """Makes those who wait ask their conditions again."""
        with self._changed:
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------- in its own thread

    def _work(self) -> None:
        try:
            self._serve()
        finally:  # whatever happened, nobody may wait for ever
            with self._changed:
                self._is_open = False
                for job in (*self._running.values(), *self._waiting):
                    job.error, job.is_done = ProviderError("the model was closed"), True
                self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._waiting or self._running or not self._is_open)
                calls, self._calls = self._calls, deque()
                is_open = self._is_open
            while calls:
                calls.popleft()()  # and no name for it: what it holds is the model that may be dropped next
            if not is_open:
                return
            if (self._waiting or self._running) and self._step_or_fail():
                self.notify()

    def _step_or_fail(self) -> bool:
        try:
            return self._step()
        except DeviceMemoryError as error:
            self._begin_again(error)
        except Exception as error:  # noqa: BLE001 - raised by those whose answers it ends; the thread is for all others too
            self._fail_running(error)
        return True

    def _fail_running(self, error: BaseException) -> None:
        for place, job in list(self._running.items()):
            self._end(place, job, error)

    def _begin_again(self, error: DeviceMemoryError) -> None:
        """Lets all prompts in flight start anew with half as many places; with a single place its prompt fails."""
        places = self._decoder.places
        if places < 2:
            self._fail_running(error)
        jobs = list(self._running.values())
        for job in jobs:
            job.restart()
        with self._changed:
            self._waiting.extendleft(reversed(jobs))
        for place in self._running:
            self._decoder.remove(place)
        self._running.clear()
        self._decoder.close()
        if places > 1:
            self._narrow(places // 2, error)

    def _end(self, place: int, job: Job, error: BaseException | None = None) -> None:
        self._decoder.remove(place)
        del self._running[place]
        job.error, job.is_done = error, True

    def _step(self) -> bool:
        """Fills free places, feeds every prompt, takes every search further; returns whether a job ended."""
        for place, job in list(self._running.items()):
            if job.is_done:  # discarded
                self._end(place, job)
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
                if isinstance(error, DeviceMemoryError) and self._decoder.places > 1:
                    raise  # with fewer places there is room to encode it
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
        places = max(decoder.places, min(self._max_batch, padded_count(len(lengths))))
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
