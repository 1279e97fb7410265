"""A request in flight: its state, its logs and its result."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
import sys
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image as PILImage

from florence_onnx import forks
from florence_onnx.fal import problems
from florence_onnx.fal.byte_budget import Charge
from florence_onnx.fal.contract import Arguments
from florence_onnx.fal.problems import RequestError
from florence_onnx.generation.progress import Cancel, OnTokens
from florence_onnx.prediction import EncodedImage, Prediction

State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
"""fal's names of the states."""
Priority = Literal["normal", "low"]
LogLine = dict[str, str]
"""fal's keys of a log line: `message`, `level`, `source`, `timestamp`."""

_order = itertools.count()


@dataclass(frozen=True)
class Answer:
    """The result of a request."""

    body: dict[str, Any]
    """fal's JSON."""
    extra: dict[str, Any]
    """Fields that fal's JSON does not have: `quads`, `polygons`, `text`, `truncated`."""


@dataclass(eq=False)
class Job:
    """One request. Change it through its methods only; they are thread-safe."""

    arguments: Arguments
    priority: Priority = "normal"
    deadline: float | None = None
    """Value of `time.monotonic` after which the request fails if the model has not started on it; None for no limit."""
    owner: str = ""
    """The client that asked, with whom others share what is bounded."""
    charge: Charge | None = None
    """The bytes of the budget that this request holds."""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    order: int = field(default_factory=lambda: next(_order))
    """Sequence number: requests of equal priority run in this order."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage: `queue`, `download`, `load`, `vision`, `decode`, `draw`."""
    logs: list[LogLine] = field(default_factory=list)
    future: Future[Answer] = field(default_factory=Future)
    """Resolves to the result, or to a `RequestError`."""
    on_tokens: OnTokens | None = None
    """Called after every decode step of the answer, as `Progress` says; None where nobody follows it."""
    on_prediction: Callable[[Prediction[Any]], None] | None = None
    """Called with the model's answer, before its annotated image is drawn."""
    stop: Cancel = field(default_factory=Cancel)
    """Ends the answer at the next decode step; set when the request has failed or was cancelled."""
    needs_download: bool = False
    """Whether the image is still to be downloaded."""
    content: bytes | None = None
    """The image file, from when it is downloaded until it is decoded."""
    image: PILImage.Image | None = None
    """The decoded image, from when it is loaded until its features are computed."""
    features: EncodedImage | None = None
    """The features of the image, if they were cached when it was loaded."""
    digest: bytes = b""
    """SHA-256 of the image file, the key of the feature cache."""
    was_fetched: bool = False
    """Whether the caller has fetched the result."""
    _outcome: Answer | RequestError | None = None
    """What `future` resolves to; kept beside it for forked children, whose copy of the future may be locked."""
    _state: State = "IN_QUEUE"
    _created: float = field(default_factory=time.monotonic)
    _started: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listeners: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        forks.call_in_child(self._end_in_child)

    @property
    def state(self) -> State:
        """The current state."""
        return self._state

    @property
    def is_waiting(self) -> bool:
        """Whether the model has not started on it."""
        return self._state == "IN_QUEUE"

    @property
    def has_expired(self) -> bool:
        """Whether `deadline` has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def problem(self) -> RequestError | None:
        """The error of a failed request; None for a request in flight and for one that succeeded."""
        error = self.future.exception() if self.future.done() else None
        return error if isinstance(error, RequestError) else None

    @property
    def metrics(self) -> dict[str, float]:
        """fal's metrics: `inference_time`, the seconds of all stages except the queue."""
        return {"inference_time": sum(taken for stage, taken in self.seconds.items() if stage != "queue")}

    @property
    def num_answer_bytes(self) -> int:
        """Bytes that the answer of a request that has ended takes, roughly."""
        if not self.future.done() or self.future.exception() is not None:
            return 1024
        answer = self.future.result()
        return 1024 + len(str(answer.body)) + len(str(answer.extra))

    def ended(self) -> asyncio.Future[Answer]:
        """Returns a future for `asyncio.wait` that is done when the request has ended, successfully or not."""
        future = asyncio.wrap_future(self.future)
        # reading the exception keeps asyncio from logging that it was never retrieved
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    def log(self, message: str) -> None:
        """Adds a log line, which the caller can read."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        self.logs.append({"message": message, "level": "INFO", "source": "run", "timestamp": now})
        self._notify()

    def start(self) -> bool:
        """Marks the request as in progress; returns False if it has already ended."""
        with self._lock:
            if self._state != "IN_QUEUE":
                return False
            self._state = "IN_PROGRESS"
            self._started = time.monotonic()
            self.seconds["queue"] = max(0.0, self._started - self._created - sum(self.seconds.values()))
        self.log("started")
        return True

    def finish(self, answer: Answer) -> bool:
        """Ends the request with a result; returns False if it has already ended."""
        return self._end(answer)

    def fail(self, problem: RequestError) -> bool:
        """Ends the request with an error; returns False if it has already ended."""
        # a traceback would keep the image and the arguments in memory for as long as the result is kept
        problem.__traceback__ = problem.__context__ = None
        return self._end(problem)

    def cancel(self) -> bool:
        """Cancels the request; returns False if it has already ended."""
        return self.fail(problems.cancelled())

    def _end(self, outcome: Answer | RequestError) -> bool:
        with self._lock:
            if self._state == "COMPLETED":
                return False
            was_running = self._state == "IN_PROGRESS"
            self._outcome = outcome
            self._state = "COMPLETED"
        if isinstance(outcome, RequestError):
            self.stop.cancel()
        if not was_running:  # else the batch that it is part of still needs it
            self.forget()
        self._settle(outcome)
        self._notify()
        return True

    def drop_source(self) -> None:
        """Drops the image file and its address, once the image is decoded."""
        self.content = None
        self.arguments = dataclasses.replace(self.arguments, image_url="")
        if self.charge is not None:
            self.charge.shrink(sys.getsizeof(self.arguments.text_input) + self.arguments.extensions.num_bytes)

    def forget(self) -> None:
        """Drops what was asked, which may be megabytes; an answer is kept for an hour."""
        self.content = self.image = self.features = None
        self.arguments = Arguments(self.arguments.task, "")
        if self.charge is not None:
            self.charge.release()

    def _settle(self, outcome: Answer | RequestError) -> None:
        if isinstance(outcome, Answer):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)

    def _end_in_child(self) -> None:
        """Ends the request in a forked child: the threads that work on it are those of the parent."""
        self._lock, self._listeners, self.future = threading.Lock(), [], Future()
        self.charge = None  # of the parent's budget
        self.forget()
        self._state, self._outcome = "COMPLETED", self._outcome or problems.forked()
        self._settle(self._outcome)

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Registers a listener for changes of state and logs.

        Args:
            listener: Called after every change, in the thread that made it.

        Returns:
            A function that unregisters the listener.
        """
        with self._lock:
            self._listeners.append(listener)

        def stop() -> None:
            with self._lock:
                if listener in self._listeners:
                    self._listeners.remove(listener)

        return stop

    def _notify(self) -> None:
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener()


@dataclass(frozen=True)
class Stats:
    """Counts of a service, for metrics: the first two are of now, all others are totals since its start."""

    waiting: int
    """Requests that wait, those whose image is being loaded included."""
    in_progress: int
    """Requests of the batches in flight."""
    finished: int
    """Requests that ended with a result."""
    failed: int
    """Requests that ended with an error, cancelled ones included."""
    batches: int
    """Batches that were started."""
    encoded: int
    """Requests whose image went through the vision encoder."""
    reused: int
    """Requests whose image features were cached."""
