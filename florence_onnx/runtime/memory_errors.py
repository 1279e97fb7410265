"""Too little memory while a model is loaded, said as such: how much a load takes, and one error for all ways to fail.

Under limits of address space and data (`RLIMIT_AS`, `RLIMIT_DATA`) a load has ended in `MemoryError`, in `OSError` and
`RuntimeError` where a thread or a map did not get its memory, and in ONNX Runtime's errors with `std::bad_alloc`. The
tokenizer's library ends the process; nothing can be said there.
"""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterable, Iterator
from pathlib import Path

from florence_onnx.bundles.bundle import WEIGHTS
from florence_onnx.bundles.memory import is_out_of_memory
from florence_onnx.errors import DeviceMemoryError, FlorenceError

NO_THREAD = "can't start new thread"
"""What Python says where the stack of a thread gets no memory, or the process may have no more threads."""

OVERHEAD = 100 * 2**20
"""Bytes that sessions, threads and arenas take whatever the weights are: the demo, whose files have 7 MiB, needs between 80
and 100 MiB of `RLIMIT_DATA` beyond what is used once everything is imported."""


@contextlib.contextmanager
def said_as_such(name: str, graphs: Iterable[Path] = ()) -> Iterator[None]:
    """Turns what the interpreter raises for want of memory into our error; errors of ours pass.

    Args:
        name: What is being loaded.
        graphs: Its graphs, as far as they are known; the error tells what they take.

    Raises:
        DeviceMemoryError: There was not enough memory.
    """
    try:
        yield
    except FlorenceError:
        raise
    except (MemoryError, OSError, RuntimeError) as error:
        if not is_out_of_memory(error) and NO_THREAD not in str(error):
            raise
        cause = (
            "out of memory, or of the threads that a process may have" if NO_THREAD in str(error) else "out of memory"
        )
        raise DeviceMemoryError(f"{cause}: cannot load {name}. {_advice(graphs)}{_reason(error)}") from error


def error_for(provider: str, graph: Path, error: BaseException) -> DeviceMemoryError:
    """Our error where an execution provider has not enough memory for a graph.

    ONNX Runtime takes a size that a damaged file claims at its word, so the error leaves that open.
    """
    return DeviceMemoryError(
        f"out of memory: {provider} cannot load {graph}. {_advice([graph])} If that much is free, the file is damaged: "
        f"export or download it again.{_reason(error)}"
    )


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    return f" The reason given: {text}" if text else ""


def _advice(graphs: Iterable[Path]) -> str:
    """What some graphs take while they are loaded, and what takes less.

    ONNX Runtime holds weights twice for a moment: as they are in the file, and as its kernels want them (a graph with
    200 MiB of weights needs between 390 and 410 MiB).
    """
    files = {file for graph in graphs for file in _files(graph)}
    stored = sum(file.stat().st_size for file in files)
    need = f"Its files have {_mib(stored)}, and to load them takes about {_mib(2 * stored + OVERHEAD)} of free memory. "
    return f"{need if stored else ''}End other programs, or use a bundle in fp16 or int8."


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.0f} MiB"


def _files(graph: Path) -> list[Path]:
    """A graph's file and those that may hold its weights: the bundle's, or one named after the graph."""
    beside = [graph, graph.with_name(WEIGHTS), *graph.parent.glob(f"{glob.escape(graph.name)}[._]data*")]
    return [file for file in beside if file.is_file()]
