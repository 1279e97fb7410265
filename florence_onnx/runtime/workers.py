"""Work on the host that goes on while a device is busy."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from florence_onnx.runtime import cpu

T = TypeVar("T")
R = TypeVar("R")


def in_portions(work: Callable[[T], R], items: Sequence[T], size: int) -> Iterator[list[R]]:
    """Does something to all items on all cores, and gives the results in portions, in order.

    Two portions at most are done ahead: what they hold may be large.

    Args:
        work: Called in threads.
        items: What to do it to.
        size: Items of a portion.

    Raises:
        Exception: The first that `work` raised, when its portion is due.
    """
    with ThreadPoolExecutor(cpu.num_cores()) as pool:
        begun: deque[Future[R]] = deque()
        waiting = deque(items)
        while waiting or begun:
            while waiting and len(begun) < 2 * size:
                begun.append(pool.submit(work, waiting.popleft()))
            portion = [begun.popleft() for _ in range(min(size, len(begun)))]
            yield [future.result() for future in portion]
