"""Whole pipelines: a data set of answers from a data set of images, and a batch job on a cluster."""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from florence_onnx import errors
from florence_onnx.batch.job import Job, Summary, check_job, locked
from florence_onnx.errors import FlorenceError, InputError, MissingExtraError, ProviderError
from florence_onnx.ray.predictor import Predictor

if TYPE_CHECKING:
    import ray.data

BATCH_SIZE = 32
"""Images of a call of the predictor; enough to read the next ones while the model works on the last."""
ROWS_PER_BLOCK = 256
"""Images that an actor is given at a time, and that are answered again if it dies. Ray's own blocks of 128 MiB are a thousand
photographs, or all names of a large data set, of which one actor would have all."""

_LAST_LINE = re.compile(r"^florence_onnx\.errors\.(\w+): (.*)\Z", re.MULTILINE | re.DOTALL)
_PENDING = ".pending.parquet"
CONNECT_SECONDS = 10.0
"""For the first connection to a cluster."""


@dataclass(frozen=True)
class Actors:
    """Processes of the cluster that hold a model each."""

    count: int | tuple[int, int] = 1
    """How many; or at least and at most, between which Ray Data chooses."""
    num_cpus: float = 1
    """CPUs of each, and threads of its model."""
    num_gpus: float = 0
    """GPUs of each; a fraction shares one."""

    def __post_init__(self) -> None:
        low, high = (self.count, self.count) if isinstance(self.count, int) else self.count
        if not 1 <= low <= high or self.num_cpus < 0 or self.num_gpus < 0:
            raise InputError(f"actors must be at least 1, and CPUs and GPUs not negative, got {self}")


def answer(
    dataset: ray.data.Dataset,
    *,
    actors: Actors | None = None,
    batch_size: int = BATCH_SIZE,
    rows_per_block: int = ROWS_PER_BLOCK,
    **arguments: Any,
) -> ray.data.Dataset:
    """A data set of answers; nothing is run until it is read or written.

    Args:
        dataset: N rows with encoded images.
        actors: Who answers.
        batch_size: Images of a call.
        rows_per_block: Images of a block.
        **arguments: Of `Predictor`.

    Returns:
        N x T rows for T tasks.

    Raises:
        InputError: A size is wrong.
        MissingExtraError: Ray is not installed.
    """
    data = _ray().data
    actors = actors or Actors()
    if batch_size < 1 or rows_per_block < 1:
        raise InputError(f"batch_size and rows_per_block must be at least 1, got {batch_size} and {rows_per_block}")
    low, high = (actors.count, actors.count) if isinstance(actors.count, int) else actors.count
    # all rows of an image stay in one block, and so in one file: Ray's checkpoint knows images, not rows
    return dataset.repartition(target_num_rows_per_block=rows_per_block).map_batches(
        Predictor,
        fn_constructor_kwargs=arguments,
        batch_format="pyarrow",
        batch_size=min(batch_size, rows_per_block),
        compute=data.ActorPoolStrategy(min_size=low, max_size=high),
        num_cpus=actors.num_cpus,
        num_gpus=actors.num_gpus,
    )


def run(
    job: Job,
    *,
    actors: Actors | None = None,
    address: str | None = None,
    batch_size: int = BATCH_SIZE,
    rows_per_block: int = ROWS_PER_BLOCK,
) -> Summary:
    """Runs a batch job, or what is left of it, on a cluster.

    Finished images are remembered in `OUT.done` by Ray Data's checkpoint, which writes their ids before each file and commits them
    after it: killed at any moment and begun again, each row is there once. A worker or a node that dies costs the
    blocks that it had, which others answer.

    Args:
        job: `out` must be a folder `NAME.parquet`, which every node has by that path, and so must the sources and the model be.
            Ids must be unique.
        actors: Who answers.
        address: Of the cluster, such as `"auto"`; None for the one that this process is connected to, else a new one here.
        batch_size: As for `answer`.
        rows_per_block: As for `answer`.

    Raises:
        InputError: As for `florence_onnx.batch.run`; or the output is not parquet, or there is no such cluster.
        ProviderError: The cluster or a device failed; rows that were written stay.
        MissingExtraError: Ray is not installed.
    """
    _check(job)
    ray = _ray()
    begin, checkpoint = time.monotonic(), job.out.with_name(job.out.name + ".done")
    with locked(job.out), _connected(ray, address), _errors_named(ray):
        from florence_onnx.ray.datasource import COLUMNS, Items

        source = Items(job.sources, job.source_options)
        _check_checkpoint(job, checkpoint)
        check_job(job, engine="ray")
        before = _count(job.out, checkpoint)
        with _checkpointing(ray.data, checkpoint):
            answers = answer(
                ray.data.read_datasource(source),
                actors=actors,
                batch_size=batch_size,
                rows_per_block=rows_per_block,
                **_arguments(job),
                columns=COLUMNS,
            )
            answers.write_parquet(str(job.out.resolve()), filename_provider=_names(), min_rows_per_file=job.shard_rows)
        after = _count(job.out, checkpoint)
    kinds = {name: count for name, count in (after - before).items() if name is not None}
    return Summary(
        num_rows=after.total() - before.total(),
        num_errors=sum(kinds.values()),
        num_done_before=before.total(),
        seconds=time.monotonic() - begin,
        errors=kinds,
    )


def _check(job: Job) -> None:
    if (job.form or job.out.suffix.lower().lstrip(".")) != "parquet":
        raise InputError(f"on Ray the output is parquet: name it {job.out.with_suffix('.parquet')}, got {job.out}")
    if job.shard != (1, 1) or job.txt:
        raise InputError("on Ray there are no --shard, because the cluster divides the work, and no text files")
    if "-" in job.sources:
        raise InputError(
            "on Ray sources are files that every node can read: write the names of standard input to a .txt"
        )


def _check_checkpoint(job: Job, checkpoint: Path) -> None:
    """Removes the checkpoint of a job that is to begin anew.

    Raises:
        InputError: There are rows, and nothing says which.
    """
    if job.restart and checkpoint.exists():
        # at once: of half a checkpoint, rows would be answered twice
        removed = checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}.{time.time_ns()}"))
        shutil.rmtree(removed)
    if not job.restart and not checkpoint.exists() and any(job.out.glob("part-*.parquet")):
        raise InputError(f"{checkpoint}, which says what is done, is missing: --restart begins anew")


def _arguments(job: Job) -> dict[str, Any]:
    question = job.question
    return {
        "model": job.loading.name,
        "tasks": question.tasks,
        "text": question.text,
        "region": question.region,
        "options": question.options,
        "public_only": question.public_only,
        "max_pixels": question.max_pixels,
        **job.loading.arguments,
    }


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    return ray


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster, which ends if it begins here."""
    if ray.is_initialized():
        yield
        return
    try:
        _check_reachable(address)
        ray.init(address=address)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster at {address}: {error}. `ray start --head` starts one, --address names it"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str | None) -> None:
    """Raises OSError where nobody listens: Ray itself tries for minutes, and ends this process then."""
    host, colon, port = (address or "").rpartition("://")[2].rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextmanager
def _errors_named(ray: Any) -> Iterator[None]:
    """Raises our own errors as such, without the tracebacks of the processes that they have passed, and others as `ProviderError`."""
    try:
        yield
    except FlorenceError as error:
        raise _own(error) or error from None
    except ray.exceptions.RayError as error:
        own = _own(error)
        if own is not None:
            raise own from None
        raise ProviderError(f"Ray has failed; what was written is kept, run the same again: {error}") from error


def _own(error: BaseException | None) -> FlorenceError | None:
    """The error of ours that caused another."""
    text = str(error)
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, FlorenceError) and not isinstance(cause, FlorenceError):
            return error
        error = cause
    return _told(text)


def _told(text: str) -> FlorenceError | None:
    """The error of ours that a traceback ends with: of an actor that could not begin, Ray keeps nothing else."""
    found = _LAST_LINE.search(text)
    kind = getattr(errors, found[1], None) if found else None
    if found is None or not (isinstance(kind, type) and issubclass(kind, FlorenceError)):
        return None
    if kind is MissingExtraError:  # has its own arguments
        return ProviderError(found[2].strip())
    return kind(found[2].strip())


@contextmanager
def _checkpointing(data: Any, path: Path) -> Iterator[None]:
    """Data sets that are made inside remember which ids were written."""
    from ray.data.checkpoint import CheckpointConfig

    context = data.DataContext.get_current()
    before = context.checkpoint_config
    context.checkpoint_config = CheckpointConfig("id", str(path.resolve()), delete_checkpoint_on_success=False)
    try:
        yield
    finally:
        context.checkpoint_config = before


def _names() -> Any:
    """Names of files as `florence_onnx.batch` reads them."""
    from ray.data.datasource import FilenameProvider

    class Names(FilenameProvider):  # type: ignore[misc]
        def get_filename_for_task(self, write_uuid: str, task_index: int) -> str:
            return f"part-{write_uuid}-{task_index:06}.parquet"

    return Names()


def _count(out: Path, checkpoint: Path) -> Counter[str | None]:
    """Rows of committed files by the class of their error, None for answers; the others may be half-written, and Ray removes them."""
    import pyarrow.parquet

    begun = {path.name.removesuffix(_PENDING) for path in checkpoint.glob(f"*{_PENDING}")}
    counts: Counter[str | None] = Counter()
    for part in out.glob("part-*.parquet"):
        if part.stem.rpartition("-")[0] not in begun:  # Ray writes `NAME-0.parquet` for the checkpoint `NAME`
            counts.update(pyarrow.parquet.read_table(part, columns=["error_type"])["error_type"].to_pylist())
    return counts
