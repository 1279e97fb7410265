"""A job: from sources to an output, which can be continued after any end and never holds a row twice."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from florence_onnx._version import __version__
from florence_onnx.batch.answering import Loading, Question, answer, answer_in_processes, default_workers
from florence_onnx.batch.captions import CaptionSidecars
from florence_onnx.batch.items import Item, Source, in_shard
from florence_onnx.batch.outputs import SHARD_ROWS, open_output
from florence_onnx.batch.rows import Key, Row
from florence_onnx.batch.sources import SourceOptions, open_sources
from florence_onnx.errors import InputError, MissingExtraError
from florence_onnx.model import Florence2

FORMAT = "florence_onnx batch job"


@dataclass(frozen=True)
class Job:
    """What is to be done."""

    sources: tuple[str, ...]
    """Paths, folders, globs, URLs, `-` for standard input: see `sources.open_sources`."""
    out: Path
    """`NAME.jsonl`, or a folder `NAME.parquet`, or with `form` any name."""
    question: Question
    loading: Loading
    source_options: SourceOptions = field(default_factory=SourceOptions)
    form: str | None = None
    """One of `outputs.FORMS`; None for that of the name of `out`."""
    shard_rows: int = SHARD_ROWS
    """Rows of a file of a folder."""
    shard: tuple[int, int] = (1, 1)
    """Only part i of n of the images, i from 1."""
    txt: bool = False
    """Whether to write the text of each answer into a file beside its image, too."""
    txt_dir: Path | None = None
    """Folder of these files instead."""
    workers: int | None = None
    """Processes; None for one a core where the model is small and on a CPU, else one."""
    restart: bool = False
    """Whether to remove rows that are there and begin anew."""


@dataclass
class Summary:
    """What a run has done."""

    num_rows: int = 0
    """Written by this run."""
    num_errors: int = 0
    """Of them."""
    num_done_before: int = 0
    """That were there already."""
    num_repeated: int = 0
    """Images that came twice and were answered once."""
    seconds: float = 0.0
    is_stopped: bool = False
    """Whether the run was ended before all was done."""
    errors: dict[str, int] = field(default_factory=dict)
    """Rows by the class of their error."""

    def add(self, row: Row) -> None:
        """Counts a row."""
        self.num_rows += 1
        if row.error_type is not None:
            self.num_errors += 1
            self.errors[row.error_type] = self.errors.get(row.error_type, 0) + 1


class Stop:
    """Ends a run: `begin` lets no more images begin, and those in flight are answered and written."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def begin(self) -> None:
        """Stops; may be called from any thread and from a signal handler."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether the run is to end."""
        return self._event.is_set()


Observe = Callable[[Row, Summary], None]


def run(
    job: Job,
    *,
    on_row: Observe | None = None,
    on_begin: Callable[[int | None, int], None] | None = None,
    stop: Stop | None = None,
) -> Summary:
    """Runs a job, or what is left of it.

    Args:
        job: What is to be done.
        on_row: Called after each row is written, with it and the counts so far.
        on_begin: Called once with the number of rows in all, None where that is not known, and of those that are there.
        stop: Ends the run from outside.

    Raises:
        InputError: Sources, options or the output are wrong; the output is of another job; or another run writes to it.
        ProviderError: The device failed; rows that were written stay.
        MissingExtraError: A library for these sources or this output is missing.
    """
    number, count = job.shard
    if not 1 <= number <= count:
        raise InputError(f"shard must be i of n with i from 1 to n, got {number}/{count}")
    if not job.question.tasks:
        raise InputError("give at least one task")
    if job.txt and len(job.question.tasks) > 1:
        raise InputError("text files hold the answer of one task; run the tasks apart, or leave --txt out")
    begin, stop, summary = time.monotonic(), stop or Stop(), Summary()
    sources = open_sources(job.sources, job.source_options)
    output = open_output(job.out, job.form, job.shard_rows)
    texts = CaptionSidecars(job.txt_dir) if job.txt else None
    with locked(job.out), ExitStack() as stack:
        check_job(job, engine="local")
        done = output.repair()
        summary.num_done_before = len(done)
        if on_begin is not None:
            totals = [source.total for source in sources]
            known = None if None in totals or count > 1 else sum(total or 0 for total in totals)
            on_begin(None if known is None else known * len(job.question.tasks), len(done))
        stack.callback(output.close)
        for row, item in _answers(job, _wanted(sources, job, done, summary, stop)):
            if row.key in done:  # of an image of which another task was missing
                continue
            if texts is not None:
                texts.write(row, item)
            output.write(row, item)
            done.add(row.key)
            summary.add(row)
            if on_row is not None:
                on_row(row, summary)
    summary.seconds = time.monotonic() - begin
    summary.is_stopped = stop.is_set
    return summary


def _wanted(sources: Iterable[Source], job: Job, done: set[Key], summary: Summary, stop: Stop) -> Iterator[Item]:
    """The items that are not answered yet, each once; no more of them once the run is to end."""
    slugs = [task.slug for task in job.question.tasks]
    seen: set[str] = set()
    for item in chain.from_iterable(sources):
        if stop.is_set:
            return
        if not in_shard(item.id, job.shard):
            continue
        if item.id in seen:
            summary.num_repeated += 1
            continue
        seen.add(item.id)
        if all((item.id, slug) in done for slug in slugs):
            continue
        yield item


def _answers(job: Job, items: Iterator[Item]) -> Iterator[tuple[Row, Item]]:
    """The rows with their items."""
    in_flight: dict[str, Item] = {}

    def remembered() -> Iterator[Item]:
        for item in items:
            in_flight[item.id] = item
            yield item

    first = next(items, None)
    if first is None:
        return  # nothing to do, so that no model is loaded
    items = chain([first], items)
    last = job.question.tasks[-1].slug
    for row in _rows(job, remembered()):
        item = in_flight.pop(row.id) if row.task == last else in_flight[row.id]
        yield row, item


def _rows(job: Job, items: Iterator[Item]) -> Iterator[Row]:
    if job.workers is not None and job.workers < 1:
        raise InputError(f"workers must be at least 1, got {job.workers}")
    workers = job.workers
    if workers is None or workers == 1:
        model = job.loading.load()
        workers = workers or _default_workers(model)
        if workers == 1:
            yield from answer(items, model, job.question, model_name=job.loading.name)
            return
        model.check_options(job.question.options)  # a wrong option is an error now, and not in each process
        del model  # the processes have their own
    yield from answer_in_processes(items, job.loading, job.question, workers)


def _default_workers(model: Florence2) -> int:
    is_cpu = model.info()["provider"] == "CPUExecutionProvider" and not model.max_batch
    return default_workers(_size_of(model), is_cpu=is_cpu)


def _size_of(model: Florence2) -> int:
    folder = Path(str(model.info()["path"]))
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# -------------------------------------------------------------------------------------------------- one job at a time


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Refuses a second run on the same output; the lock ends with the process, however that ends.

    Raises:
        InputError: Another process holds it, or the folder cannot be written to.
        MissingExtraError: filelock is not installed.
    """
    try:
        import filelock
    except ImportError as error:
        raise MissingExtraError("filelock", "batch") from error
    path = out.with_name(out.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path)
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise InputError(f"another run writes to {out}: wait for it, or choose another output") from error
    except OSError as error:
        raise InputError(f"{out} cannot be written: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def check_job(job: Job, *, engine: str) -> None:
    """Writes what the rows of an output depend on beside it, or compares it with what is there.

    Args:
        job: The job.
        engine: What runs it: each finds out in its own way what is done.

    Raises:
        InputError: It is another.
    """
    path = job.out.with_name(job.out.name + ".job.json")
    if job.restart:
        _remove(job.out)
        path.unlink(missing_ok=True)
    content = {**_described(job), "engine": engine}
    if not path.exists():
        if job.out.exists() and (not job.out.is_dir() or any(job.out.iterdir())):
            raise InputError(
                f"{job.out} exists and is not of a batch job: choose another output, or --restart to replace it"
            )
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(path)
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in content if name != "version" and before.get(name) != content[name]]
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path} cannot be read ({error}): --restart begins anew") from error
    if changed:
        was = ", ".join(f"{name} {before.get(name)!r}" for name in changed)
        now = ", ".join(f"{name} {content[name]!r}" for name in changed)
        raise InputError(
            f"{job.out} was begun with {was}, this is {now}: choose another output, or --restart to begin anew"
        )


def _described(job: Job) -> dict[str, Any]:
    """All that the rows depend on but the sources, to which some may be added."""
    question = job.question
    options = {name: repr(value) for name, value in vars(question.options).items() if value is not None}
    model = {name: repr(value) for name, value in sorted(job.loading.arguments.items()) if value is not None}
    columns = {name: value for name, value in vars(job.source_options).items() if name != "max_pixels"}
    return {
        "format": FORMAT,
        "version": __version__,
        "model": job.loading.name,
        "loading": model,
        "tasks": [task.slug for task in question.tasks],
        "text": question.text,
        "region": None if question.region is None else question.region.location_tokens,
        "options": options,
        "sources": columns,
        "form": job.form,
        "shard": list(job.shard),
    }


def _remove(out: Path) -> None:
    """Removes the rows of an output, and nothing else."""
    if out.is_dir():
        for path in out.iterdir():
            if path.is_file() and path.name.startswith(("part-", "shard-", "_rows")):
                path.unlink()
    else:
        out.unlink(missing_ok=True)


@contextmanager
def stopping_on_signals(stop: Stop, tell: Callable[[str], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM lets rows in flight be finished; the second ends at once."""

    def handle(number: int, frame: object) -> None:
        if stop.is_set:
            raise KeyboardInterrupt
        stop.begin()
        tell("stopping: images in flight are finished; once more stops at once")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
