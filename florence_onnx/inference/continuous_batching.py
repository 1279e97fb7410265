"""Continuous batching: prompts of all callers share one batch on the device, which they join and leave at any step.

One thread runs all graphs of the device. ONNX Runtime keeps captured CUDA graphs per thread, so that every further thread
would capture all of them again. Callers' threads only allocate and copy tensors, under `cuda_memory.LOCK`.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from florence_onnx.errors import DeviceMemoryError, FlorenceError, OptionsError, ProviderError
from florence_onnx.generation.progress import Progress
from florence_onnx.generation.scores import Ids, TopScores
from florence_onnx.generation.search import GeneratedSequence, Search, unstarted
from florence_onnx.inference.decoder_call import padded_count
from florence_onnx.inference.slot_table import SlotTable
from florence_onnx.runtime.device_memory import DeviceArray

SHRINK_AFTER = 256
"""Number of consecutive prompts that fit shorter buffers after which such are allocated; not at once, because with new
buffers all CUDA graphs are captured again."""
T = TypeVar("T")
_log = logging.getLogger("florence_onnx")


class BatchDecoder(Protocol):
    """A decoder that steps a batch of prompts; `resident_decoder.ResidentDecoder` says what each member does."""

    @property
    def batch_size(self) -> int: ...

    @property
    def encoder_length(self) -> int: ...

    def padded_length(self, prompt_ids: Ids, features: DeviceArray) -> int: ...

    def allocate(self, batch_size: int, encoder_length: int) -> None: ...

    def release(self) -> None: ...

    def grow_batch(self, batch_size: int) -> None: ...

    def add(self, prompt_ids: Ids, features: DeviceArray) -> int: ...

    def remove(self, batch_index: int) -> None: ...

    def slot_table(self, batch_index: int) -> SlotTable: ...

    def step(self, token_ids: Mapping[int, Ids]) -> dict[int, TopScores]: ...


class DecodeRequest:
    """A prompt to be answered: first waiting, then in flight, then done with a result or an error."""

    def __init__(
        self,
        prompt_ids: Ids,
        features: DeviceArray,
        new_search: Callable[[], Search],
        progress: Progress | None = None,
    ) -> None:
        """Args:
        prompt_ids: `(T,)`.
        features: `(N, D)` on the decoder's device; N may differ between requests.
        new_search: Makes a search of one prompt; called again when decoding starts over.
        progress: What may end the answer before it is begun; None for nothing. Later its search ends it.
        """
        self.prompt_ids = prompt_ids
        self.features = features
        self._new_search = new_search
        self._progress = progress or Progress()
        self.is_done = False
        self.error: BaseException | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets all tokens that were generated."""
        self.search = self._new_search()
        self.is_started = False
        self.next_tokens: Ids = self.search.start()

    @property
    def has_to_end(self) -> bool:
        """Whether a deadline or its caller ends the answer now."""
        return self._progress.reason() is not None

    def finish(self, error: BaseException | None = None) -> None:
        """Marks the request as done, with the search's result or with an error."""
        self.error, self.is_done = error, True

    def result(self) -> GeneratedSequence:
        """The answer of a request that is done.

        Raises:
            FlorenceError: Decoding failed.
            RuntimeError: Decoding failed with an error that is not one of ours.
        """
        if isinstance(self.error, FlorenceError):
            # One error may have ended many requests: each raises a copy, so that callers do not share a traceback.
            raise type(self.error)(*self.error.args) from self.error
        if self.error is not None:
            raise RuntimeError(f"decoding failed: {self.error}") from self.error
        reason = self._progress.reason()
        if not self.is_started and reason is not None:
            return unstarted(self.search, reason)
        return self.search.results()[0]


class ContinuousBatch:
    """The requests in flight, those that wait, and the thread that runs the device's graphs."""

    def __init__(self, decoder: BatchDecoder, max_batch: int) -> None:
        """Args:
        decoder: Used by this object alone.
        max_batch: Most prompts in flight; reduced for good when device memory turns out to hold fewer.
        """
        self._decoder = decoder
        self._max_batch = max_batch
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[DecodeRequest] = deque()
        self._in_flight: dict[int, DecodeRequest] = {}  # by batch index
        self._is_open = True
        self._num_shorter = 0
        # a daemon, so that the interpreter can exit without `close`
        self._thread = threading.Thread(target=self._run, name="florence-device", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its present step; requests that are not done fail."""
        with self._changed:
            self._is_open = False
            self._changed.notify_all()

    def submit(self, request: DecodeRequest) -> None:
        """Queues a request.

        Raises:
            ProviderError: The thread has ended.
        """
        with self._changed:
            self._check_open()
            self._waiting.append(request)
            self._changed.notify_all()

    def _check_open(self) -> None:
        if not self._is_open:
            raise ProviderError("this model is closed: its device failed; load it again")

    def call(self, function: Callable[[], T]) -> T:
        """Calls a function in the device thread, between two steps, and waits for it.

        Returns:
            What the function returns.

        Raises:
            BaseException: What the function raises.
            ProviderError: The thread has ended.
        """
        from concurrent.futures import Future

        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:  # noqa: BLE001 - raised again in the thread that waits for the result
                future.set_exception(error)

        with self._changed:
            self._check_open()
            self._calls.append(run)
            self._changed.notify_all()
        return future.result()

    def cancel(self, requests: Sequence[DecodeRequest]) -> None:
        """Drops requests whose results are no longer needed: waiting ones now, those in flight before the next step."""
        with self._changed:
            for request in requests:
                request.is_done = True
            self._waiting = deque(request for request in self._waiting if not request.is_done)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Blocks until a condition holds; it is evaluated whenever requests are done, and at `notify`."""
        with self._changed:
            self._changed.wait_for(condition)

    def notify(self) -> None:
        """Makes all threads in `wait` evaluate their conditions again."""
        with self._changed:
            self._changed.notify_all()

    # --------------------------------------------------------------------------------------------- the device thread

    def _run(self) -> None:
        try:
            self._serve()
        finally:  # whatever happened, no caller may wait for ever
            with self._changed:
                self._is_open = False
                for request in (*self._in_flight.values(), *self._waiting):
                    request.finish(ProviderError("the model was closed"))
                self._changed.notify_all()

    def _serve(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._waiting or self._in_flight or not self._is_open)
                calls, self._calls = self._calls, deque()
                is_open = self._is_open
            while calls:
                # Not bound to a name: a call holds its model, and a variable of this loop would keep that alive.
                calls.popleft()()
            if not is_open:
                return
            if (self._waiting or self._in_flight) and self._step_or_fail():
                self.notify()

    def _step_or_fail(self) -> bool:
        """Runs a step and returns whether a request may be done; an error ends requests, and never the thread."""
        try:
            return self._step()
        except DeviceMemoryError as error:
            self._restart_with_smaller_batch(error)
        except Exception as error:  # noqa: BLE001 - raised by `DecodeRequest.result` of all requests that it ended
            self._fail_in_flight(error)
        return True

    def _fail_in_flight(self, error: BaseException) -> None:
        for batch_index, request in list(self._in_flight.items()):
            self._finish(batch_index, request, error)

    def _restart_with_smaller_batch(self, error: DeviceMemoryError) -> None:
        """Halves the batch and queues all prompts in flight again; a prompt that did not fit alone fails."""
        batch_size = self._decoder.batch_size
        if batch_size < 2:
            self._fail_in_flight(error)
        requests = list(self._in_flight.values())
        for request in requests:
            request.restart()
        with self._changed:
            self._waiting.extendleft(reversed(requests))
        for batch_index in self._in_flight:
            self._decoder.remove(batch_index)
        self._in_flight.clear()
        self._decoder.release()
        if batch_size > 1:
            self._limit_batch(batch_size // 2, error)

    def _finish(self, batch_index: int, request: DecodeRequest, error: BaseException | None = None) -> None:
        self._decoder.remove(batch_index)
        del self._in_flight[batch_index]
        request.finish(error)

    def _step(self) -> bool:
        """Admits waiting requests, runs one decode step, advances every search; returns whether a request is done."""
        for batch_index, request in list(self._in_flight.items()):
            if request.is_done:  # cancelled
                self._finish(batch_index, request)
        has_finished = self._end_waiting()
        has_finished |= self._admit()
        if not self._in_flight:
            return has_finished
        scores = self._decoder.step({at: request.next_tokens for at, request in self._in_flight.items()})
        for batch_index, request in list(self._in_flight.items()):
            has_finished |= self._advance(batch_index, request, scores[batch_index])
        return has_finished

    def _end_waiting(self) -> bool:
        """Ends the requests that wait and have no time to be begun; returns whether there are any."""
        with self._changed:
            ending = [request for request in self._waiting if request.has_to_end]
            for request in ending:
                request.finish()
                self._waiting.remove(request)
        return bool(ending)

    def _advance(self, batch_index: int, request: DecodeRequest, scores: TopScores) -> bool:
        """Takes a search one step further; returns whether it is done."""
        try:
            continuation = request.search.advance(scores if request.is_started else scores.last_position())
        except OptionsError as error:  # of a function that constrains this request alone
            self._finish(batch_index, request, error)
            return True
        request.is_started = True
        if continuation is None:
            self._finish(batch_index, request)
            return True
        table = self._decoder.slot_table(batch_index)
        if continuation.kept is not None:
            table.keep(continuation.kept)
        table.reorder(continuation.rows)
        request.next_tokens = continuation.token_ids
        return False

    # ------------------------------------------------------------------------------------------------------ admission

    def _admit(self) -> bool:
        """Adds waiting requests to the batch in their order, while there is room; returns whether one failed."""
        has_failed = False
        while (request := self._next()) is not None:
            try:
                if not self._make_room(request):
                    return has_failed
                batch_index = self._decoder.add(request.prompt_ids, request.features)
            except FlorenceError as error:
                if isinstance(error, DeviceMemoryError) and self._decoder.batch_size > 1:
                    raise  # in a smaller batch there is memory to encode it
                request.finish(error)
                has_failed = True
            else:
                self._in_flight[batch_index] = request
            with self._changed:
                if self._waiting and self._waiting[0] is request:  # not cancelled meanwhile
                    self._waiting.popleft()
        return has_failed

    def _next(self) -> DecodeRequest | None:
        with self._changed:
            return self._waiting[0] if self._waiting and len(self._in_flight) < self._max_batch else None

    def _make_room(self, request: DecodeRequest) -> bool:
        """Whether the batch has room for a request, or was given room now."""
        decoder = self._decoder
        length = decoder.padded_length(request.prompt_ids, request.features)
        self._num_shorter = self._num_shorter + 1 if length < decoder.encoder_length else 0
        if not self._in_flight:
            self._allocate(length)
            return True
        if length > decoder.encoder_length:
            return False  # longer buffers can only replace those of an empty batch: it waits, and those behind it too
        return len(self._in_flight) < decoder.batch_size or self._grow_batch()

    def _allocate(self, length: int) -> None:
        """Allocates an empty batch for the requests that wait, at least as large as the present one."""
        decoder = self._decoder
        with self._changed:
            first = list(self._waiting)[: self._max_batch]
        lengths = [decoder.padded_length(request.prompt_ids, request.features) for request in first]
        length = max([length, *lengths])
        if self._num_shorter < SHRINK_AFTER:
            length = max(length, decoder.encoder_length)
        batch_size = max(decoder.batch_size, min(self._max_batch, padded_count(len(lengths))))
        while True:
            try:
                return decoder.allocate(batch_size, length)
            except DeviceMemoryError as error:
                if batch_size == 1:
                    raise
                batch_size = self._limit_batch(batch_size // 2, error)

    def _grow_batch(self) -> bool:
        """Doubles the batch beside the prompts in flight; returns False where memory does not allow it."""
        batch_size = min(self._max_batch, 2 * self._decoder.batch_size)
        try:
            self._decoder.grow_batch(batch_size)
        except DeviceMemoryError as error:
            self._limit_batch(self._decoder.batch_size, error)
            return False
        return True

    def _limit_batch(self, max_batch: int, error: DeviceMemoryError) -> int:
        self._max_batch = max_batch
        _log.warning("no more than %d prompts in flight from now on: %s", max_batch, error)
        return max_batch
