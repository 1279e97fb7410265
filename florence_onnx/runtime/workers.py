"""Work on the host that overlaps with work on a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from florence_onnx.runtime import cpu

T = TypeVar("T")
R = TypeVar("R")


def map_in_batches(function: Callable[[T], R], items: Sequence[T], batch_size: int) -> Iterator[list[R]]:
    """Applies a function to all items on all cores and yields the results in batches, in order.

    Works at most two batches ahead, since results (decoded images) may be large.

    Args:
        function: Called in threads.
        items: Its arguments.
        batch_size: Results per batch; the last batch may be smaller.

    Raises:
        Exception: The first that `function` raised, when its batch is due.
    """
    with ThreadPoolExecutor(cpu.num_cores()) as pool:
        started: deque[Future[R]] = deque()
        waiting = deque(items)
        while waiting or started:
            while waiting and len(started) < 2 * batch_size:
                started.append(pool.submit(function, waiting.popleft()))
            batch = [started.popleft() for _ in range(min(batch_size, len(started)))]
            yield [future.result() for future in batch]
