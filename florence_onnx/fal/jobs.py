"""A request on its way: its state, what was logged, and how it ends."""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal

from PIL import Image as PILImage

from florence_onnx.fal import problems
from florence_onnx.fal.contract import Question
from florence_onnx.fal.problems import RequestError

State = Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
"""fal's names."""
Priority = Literal["normal", "low"]
LogLine = dict[str, str]
"""`message`, `level`, `source`, `timestamp`, as fal logs."""

_order = itertools.count()


@dataclass(frozen=True)
class Answer:
    """What a request came to."""

    body: dict[str, Any]
    """fal's JSON."""
    extra: dict[str, Any]
    """What fal's JSON has no place for: `quads`, `polygons`, `text`, `truncated`."""


@dataclass(eq=False)
class Job:
    """One request. All changes go through its methods, which are safe in threads."""

    question: Question
    priority: Priority = "normal"
    deadline: float | None = None
    """Moment of `time.monotonic` at which waiting ends, unless the work began before."""
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    order: int = field(default_factory=lambda: next(_order))
    seconds: dict[str, float] = field(default_factory=dict)
    """What each stage took: queue, load, vision, decode, draw."""
    logs: list[LogLine] = field(default_factory=list)
    future: Future[Answer] = field(default_factory=Future)
    """The answer, or a `RequestError`."""
    image: PILImage.Image | None = None
    """Once it is loaded, until it is encoded."""
    digest: bytes = b""
    """Of the image's bytes: equal images are encoded once."""
    was_fetched: bool = False
    """Whether the caller got the result."""
    _state: State = "IN_QUEUE"
    _created: float = field(default_factory=time.monotonic)
    _started: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def state(self) -> State:
        """Where it stands."""
        return self._state

    @property
    def is_waiting(self) -> bool:
        """Whether it can still be started."""
        return self._state == "IN_QUEUE"

    @property
    def has_expired(self) -> bool:
        """Whether the caller's limit for waiting was reached."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def problem(self) -> RequestError | None:
        """How it failed; None while it is under way, and if it did not."""
        error = self.future.exception() if self.future.done() else None
        return error if isinstance(error, RequestError) else None

    @property
    def metrics(self) -> dict[str, float]:
        """fal's `inference_time`: seconds of work, without waiting."""
        return {"inference_time": sum(taken for stage, taken in self.seconds.items() if stage != "queue")}

    def ended(self) -> asyncio.Future[Answer]:
        """For `asyncio.wait`: done when the job is, whatever came of it."""
        future = asyncio.wrap_future(self.future)
        # asyncio complains of an exception that nobody looks at
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        return future

    def log(self, message: str) -> None:
        """Adds a line that the caller can read."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat()
        self.logs.append({"message": message, "level": "INFO", "source": "run", "timestamp": now})
        self._notify()

    def start(self) -> bool:
        """Begins the work; False if the job has ended meanwhile."""
        with self._lock:
            if self._state != "IN_QUEUE":
                return False
            self._state = "IN_PROGRESS"
            self._started = time.monotonic()
            self.seconds["queue"] = max(0.0, self._started - self._created - self.seconds.get("load", 0.0))
        self.log("started")
        return True

    def finish(self, answer: Answer) -> bool:
        """Ends with an answer; False if it has ended already."""
        return self._end(lambda: self.future.set_result(answer))

    def fail(self, problem: RequestError) -> bool:
        """Ends without one; False if it has ended already."""
        # a trace holds on to the image and the arguments for as long as the result is kept
        problem.__traceback__ = problem.__context__ = None
        return self._end(lambda: self.future.set_exception(problem))

    def cancel(self) -> bool:
        """Takes the request back; False if it has ended already."""
        return self.fail(problems.cancelled())

    def _end(self, settle: Callable[[], None]) -> bool:
        with self._lock:
            if self._state == "COMPLETED":
                return False
            self._state = "COMPLETED"
            self.image = None
            self.question = dataclasses.replace(self.question, image_url="")  # often megabytes
        settle()
        self._notify()
        return True

    def listen(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Calls `listener`, in any thread, at every change; returns what ends that."""
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
class Figures:
    """What a service is doing, for metrics."""

    waiting: int
    in_progress: int
    finished: int
    failed: int
    batches: int
    encoded: int
    """Images that went through the vision encoder."""
    reused: int
    """Images whose features were at hand."""
