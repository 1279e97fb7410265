"""A batch job on a cluster, as a process that a test can kill: `python -m tests.ray.cluster_job ADDRESS OUT SOURCE…`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from florence_onnx import GenerationOptions, tasks
from florence_onnx.batch.answering import Loading, Question
from florence_onnx.batch.job import Job
from florence_onnx.batch.sources import SourceOptions
from florence_onnx.ray import Actors, run

TASKS = (tasks.CAPTION, tasks.OBJECT_DETECTION)
LOADING = Loading("demo", {"device": "cpu"})
ACTORS = Actors(2)


def job(out: Path, sources: Sequence[str | Path], *, restart: bool = False, beams: int = 1, workers: int = 1) -> Job:
    """The same job on a cluster and on one computer; on a cluster `workers` says nothing."""
    return Job(
        sources=tuple(map(str, sources)),
        out=out,
        question=Question(TASKS, options=GenerationOptions(num_beams=beams)),
        loading=LOADING,
        source_options=SourceOptions(id_column="name"),
        shard_rows=8,
        workers=workers,
        restart=restart,
    )


def on_cluster(out: Path, sources: Sequence[str | Path], address: str | None = None, **more: bool | int) -> object:
    """Runs it in small blocks, so that there are many moments to be killed at."""
    return run(job(out, sources, **more), actors=ACTORS, address=address, batch_size=4, rows_per_block=4)  # type: ignore[arg-type]


if __name__ == "__main__":
    print(on_cluster(Path(sys.argv[2]), sys.argv[3:], sys.argv[1]))
