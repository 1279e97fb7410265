"""From items to rows: in this process, with the next images read meanwhile, or in several processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from PIL import Image

from florence_onnx.answers.locations import Region
from florence_onnx.batch import rows
from florence_onnx.batch.items import Item
from florence_onnx.batch.rows import Row
from florence_onnx.errors import FlorenceError, ImageError, ProviderError
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.images import decoding, opening
from florence_onnx.model import Florence2
from florence_onnx.runtime import cpu
from florence_onnx.tasks import Task

CHUNK = 8
"""Images that are answered together; as many as a CPU decodes at once."""
SMALL = 200 * 2**20
"""A model of fewer bytes is loaded in a process for each core: there Python takes as long as the graphs, on one core."""


@dataclass(frozen=True)
class Question:
    """What is asked about every image."""

    tasks: tuple[Task[Any], ...]
    text: str | None = None
    """For tasks that take a text, where an item has none."""
    region: Region | None = None
    """For tasks that take a region, where an item has none."""
    options: GenerationOptions = field(default_factory=GenerationOptions)
    public_only: bool = False
    """Whether URLs must lead to the public internet."""
    max_pixels: int = opening.MAX_PIXELS


@dataclass(frozen=True)
class Loading:
    """How a process loads the model."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    """Of `Florence2.from_pretrained`."""

    def load(self, *, num_threads: int | None = None) -> Florence2:
        """Loads it; with a number of threads where `session_options` do not say."""
        given = dict(self.arguments)
        if num_threads is not None:
            given["session_options"] = {"intra_op_num_threads": num_threads, **(given.get("session_options") or {})}
        return Florence2.from_pretrained(self.name, **given)


def answer(items: Iterable[Item], model: Florence2, question: Question, *, model_name: str = "") -> Iterator[Row]:
    """Answers items in order; the next images are read while the model works on the last ones.

    Args:
        items: Read no further than two chunks ahead.
        model: Whom to ask.
        question: What to ask.
        model_name: For the rows.

    Yields:
        For each item a row a task; an error that concerns one of them is its row.

    Raises:
        InputError: An option is wrong.
        ProviderError: The device failed.
    """
    model.check_options(question.options)
    source = iter(items)
    with ThreadPoolExecutor(max(2, cpu.num_cores()), "florence-read") as pool:
        waiting: deque[tuple[list[Item], list[Future[Image.Image | FlorenceError]]]] = deque()
        while True:
            while len(waiting) < 2 and (chunk := list(islice(source, CHUNK))):
                waiting.append((chunk, [pool.submit(_load, item, question) for item in chunk]))
            if not waiting:
                return
            chunk, images = waiting.popleft()
            yield from _answer_chunk(model, question, chunk, [each.result() for each in images], model_name)


def _load(item: Item, question: Question) -> Image.Image | FlorenceError:
    if isinstance(item.image, ImageError):
        return item.image
    try:
        limits = {
            "max_pixels": question.max_pixels,
            "public_only": question.public_only and isinstance(item.image, str),
        }
        return decoding.load(item.image, **limits)  # type: ignore[arg-type]
    except FlorenceError as error:
        return error


def _answer_chunk(
    model: Florence2,
    question: Question,
    chunk: Sequence[Item],
    images: Sequence[Image.Image | FlorenceError],
    model_name: str,
) -> Iterator[Row]:
    pairs = [(item, image, task) for item, image in zip(chunk, images, strict=True) for task in question.tasks]
    asked = [(item, image, task) for item, image, task in pairs if isinstance(image, Image.Image)]
    texts = [_text(item, task, question) for item, _, task in asked]
    regions = [_region(item, task, question) for item, _, task in asked]
    begin = time.perf_counter()
    found = iter(
        model.run_batch(
            [task for _, _, task in asked],
            [image for _, image, _ in asked],
            text_inputs=texts,
            regions=regions,
            options=question.options,
            on_error="return",
        )
        if asked
        else []
    )
    milliseconds = (time.perf_counter() - begin) * 1000 / max(1, len(asked))
    for item, image, task in pairs:
        prompt = _prompt(item, task, question)
        outcome = next(found) if isinstance(image, Image.Image) else image
        if isinstance(outcome, FlorenceError):
            yield rows.of_error(item.id, item.source, task, prompt, _without_place(outcome), model_name)
        else:
            yield rows.of_prediction(item.id, item.source, prompt, outcome, milliseconds, model_name)


def _without_place(error: FlorenceError) -> FlorenceError:
    """An error without `image 3 of 16: `, which would speak of a chunk."""
    if error.index is not None and error.args:
        error.args = (str(error.args[0]).partition(": ")[2], *error.args[1:])
    return error


def _text(item: Item, task: Task[Any], question: Question) -> str | None:
    return (item.text if item.text is not None else question.text) if task.takes_text else None


def _region(item: Item, task: Task[Any], question: Question) -> Region | None:
    return (item.region or question.region) if task.takes_region else None


def _prompt(item: Item, task: Task[Any], question: Question) -> str | None:
    region = _region(item, task, question)
    parts = [_text(item, task, question), None if region is None else region.location_tokens]
    given = [part for part in parts if part is not None]
    return " ".join(given) if given else None


# ----------------------------------------------------------------------------------------------------- several processes


def default_workers(num_bytes: int, *, is_cpu: bool) -> int:
    """In how many processes a model of that many bytes is loaded; one unless it is small and runs on a CPU."""
    return cpu.num_cores() if is_cpu and num_bytes < SMALL else 1


def answer_in_processes(items: Iterable[Item], loading: Loading, question: Question, workers: int) -> Iterator[Row]:
    """As `answer`, in several processes, each with one thread and a model of its own; rows in the order of the items.

    Args:
        items: Read no further than two chunks a process ahead.
        loading: How each process loads the model.
        question: What to ask.
        workers: Number of processes.

    Raises:
        ProviderError: A process has died, or the model failed in it.
    """
    source = iter(items)
    num_threads = max(1, cpu.num_cores() // workers)
    # spawn: a fork would copy this process's threads' locks, and Windows and macOS have no fork
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _begin_worker, (loading, question, num_threads)
    )
    waiting: deque[Future[list[Row]]] = deque()
    try:
        while True:
            while len(waiting) < 2 * workers and (chunk := list(islice(source, CHUNK))):
                waiting.append(pool.submit(_work, chunk))
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ProviderError(
            "a worker process has died, perhaps for want of memory; rows that were written are kept: run the same command again, "
            "with --workers 1 for less memory"
        ) from error
    except BaseException:
        for process in multiprocessing.active_children():  # their rows are lost anyway
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: tuple[Florence2, Question, str] | None = None


def _begin_worker(loading: Loading, question: Question, num_threads: int) -> None:
    global _worker
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the parent decides what happens to rows in flight
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    _worker = loading.load(num_threads=num_threads), question, loading.name


def _end_with_parent() -> None:
    """Ends this process when its parent has been killed: the pool's queue would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(chunk: list[Item]) -> list[Row]:
    assert _worker is not None, "the pool has begun"
    model, question, name = _worker
    return list(_answer_chunk(model, question, chunk, [_load(item, question) for item in chunk], name))
