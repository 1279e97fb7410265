"""What becomes of a process's threads and locks in a child that it forks: there are no threads, and locks stay taken.

`os.fork` (gunicorn with `preload_app`, Celery's prefork pool, multiprocessing's fork context) copies the memory of a
process and only the thread that called it. Whoever waits in the child for another thread, or for a lock that another
thread held, waits for ever. So every object that has threads or locks registers here, and is told in the child before
any other code runs there: it makes new locks at once, and starts threads anew when they are next needed.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

UNUSABLE = (
    "{} cannot be used in a process that was forked after the model was loaded: load the model in each process, after the "
    "fork (gunicorn without preload_app, an initializer of the pool, multiprocessing's spawn context)"
)
"""Message for what does not survive a fork, with the name of the device."""
_log = logging.getLogger("florence_onnx")
_registered: dict[int, tuple[weakref.ref[Any], Callable[[Any], None]]] = {}
_numbers = itertools.count()
_count = 0


def count() -> int:
    """How many forks lie between the first process and this one, since this module was imported."""
    return _count


def call_in_child(method: Callable[[], None]) -> None:
    """Calls a bound method in every child that is forked from now on, while its object is alive there.

    Args:
        method: Must neither wait for a lock nor raise; its object is referred to weakly.
    """
    number, forget = next(_numbers), _registered.pop
    # No `WeakMethod`, whose callback fails for objects that die with the interpreter, and no `WeakSet`, which stays in the
    # state of an iteration that another thread is in at the fork; `pop` of a dict is atomic.
    owner = weakref.ref(method.__self__, lambda _: forget(number, None))  # type: ignore[attr-defined]
    _registered[number] = owner, method.__func__  # type: ignore[attr-defined]


def leak(value: Any) -> None:
    """Keeps an object alive for ever, for one whose destructor would wait for threads that do not exist here."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


class Lock:
    """A lock for `with` statements that is free in a child, whoever held it at the fork."""

    def __init__(self, make: Callable[[], Any] = threading.Lock) -> None:
        """Args:
        make: Makes the lock: `threading.Lock` or `threading.RLock`.
        """
        self._make = make
        self._renew()
        call_in_child(self._renew)

    def _renew(self) -> None:
        self._lock = self._make()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()


def _after_fork_in_child() -> None:
    global _count
    _count += 1
    for reference, method in list(_registered.values()):
        owner = reference()
        if owner is None:
            continue
        try:
            method(owner)
        except Exception:  # noqa: BLE001 - the others must be told nevertheless; Python itself would only print it
            _log.exception("%r failed after a fork", method)


if hasattr(os, "register_at_fork"):  # not on Windows, which has no fork
    os.register_at_fork(after_in_child=_after_fork_in_child)
