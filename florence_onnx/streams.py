"""Calls in a thread of their own, for `Florence2.stream`, and for asyncio `astream` and `arun`.

```text
thread of the call ─on_tokens─▶ queue ─PartReader─▶ parts ─▶ the one who iterates
```

Nothing is computed in `on_tokens`: with continuous batching it runs in the thread that decodes for all callers.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from florence_onnx.generation.progress import Cancel
from florence_onnx.limits import OnIndexedTokens
from florence_onnx.parts import Part, PartReader
from florence_onnx.prediction import EncodedImage, Prediction

E = TypeVar("E")
R = TypeVar("R")
Call: TypeAlias = Callable[[Cancel, OnIndexedTokens], Prediction[Any]]
"""A call of `run` that is ended by the token and reports its tokens."""
_Tokens = tuple[Sequence[int], EncodedImage]
_Event: TypeAlias = "_Tokens | Prediction[Any] | BaseException"


class Abandon(Cancel):
    """Ends a call whose caller has gone away, or cancelled it with a token of his own."""

    def __init__(self, own: Cancel | None) -> None:
        super().__init__()
        self._own = own

    @property
    def is_cancelled(self) -> bool:
        return super().is_cancelled or (self._own is not None and self._own.is_cancelled)


def stream(call: Call, reader: PartReader, cancel: Cancel | None) -> Generator[Part | Prediction[Any], None, None]:
    """The parts of an answer as they come, then the prediction. Closing the generator ends the call at its next step.

    Args:
        call: Starts at the first part that is asked for.
        reader: Of this answer.
        cancel: The caller's token.
    """
    abandon = Abandon(cancel)
    events: SimpleQueue[_Event] = SimpleQueue()
    _start(call, abandon, events.put)
    try:
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Prediction):
                yield from reader.finish(event)
                yield event
                return
            yield from reader.read(*event)
    finally:
        abandon.cancel()


async def astream(
    call: Call, reader: PartReader, cancel: Cancel | None
) -> AsyncGenerator[Part | Prediction[Any], None]:
    """As `stream`, in an event loop, which is never blocked."""
    abandon = Abandon(cancel)
    events: asyncio.Queue[_Event] = asyncio.Queue()
    _start(call, abandon, putter(events, abandon.cancel))
    try:
        while True:
            event = await events.get()
            if isinstance(event, BaseException):
                raise event
            if isinstance(event, Prediction):
                for part in reader.finish(event):
                    yield part
                yield event
                return
            for part in reader.read(*event):
                yield part
    finally:
        abandon.cancel()


async def arun(call: Callable[[Cancel], R], cancel: Cancel | None) -> R:
    """What a call in a thread returns; cancelling the asyncio task ends the call at its next step.

    Args:
        call: Is ended by the token.
        cancel: The caller's token.
    """
    abandon = Abandon(cancel)
    done: asyncio.Queue[tuple[R] | BaseException] = asyncio.Queue()
    _in_thread(lambda: (call(abandon),), putter(done, abandon.cancel))
    try:
        event = await done.get()
    finally:
        abandon.cancel()
    if isinstance(event, BaseException):
        raise event
    return event[0]


def putter(events: asyncio.Queue[E], closed: Callable[[], None] | None = None) -> Callable[[E], None]:
    """What puts events into a queue of this thread's event loop, from any thread.

    Args:
        events: The queue.
        closed: Called in place of it when the loop is closed, so that nobody waits any more.
    """
    loop = asyncio.get_running_loop()

    def put(event: E) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:
            if closed is not None:
                closed()

    return put


def _start(call: Call, cancel: Cancel, put: Callable[[_Event], None]) -> None:
    """Runs a call in a thread, which reports its tokens and at last the prediction or the error."""

    def listen(index: int, token_ids: Sequence[int], image: EncodedImage) -> None:
        put((token_ids, image))

    _in_thread(lambda: call(cancel, listen), put)


def _in_thread(call: Callable[[], E], put: Callable[[E | BaseException], None]) -> None:
    """Puts what a call returns or raises."""

    def run() -> None:
        try:
            event: E | BaseException = call()
        except BaseException as error:  # noqa: BLE001 - raised by the one who waits
            event = error
        put(event)

    # a daemon: the interpreter can exit although somebody has left a stream behind
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(run,), name="florence-stream", daemon=True).start()
