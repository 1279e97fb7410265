"""`florence-onnx batch`: bulk work that can be continued after any end."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from florence_onnx.batch.answering import Loading, Question
from florence_onnx.batch.job import Job, Stop, Summary, run, stopping_on_signals
from florence_onnx.batch.outputs import FORMS, SHARD_ROWS
from florence_onnx.batch.rows import Row
from florence_onnx.batch.sources import SourceOptions
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import (
    DEMO_NOTE,
    BeamsOption,
    CalibrationOption,
    DeviceOption,
    GenerationOption,
    MaxNewTokensOption,
    ModelOption,
    PrecisionOption,
    exit_on_error,
    parse_options,
    parse_region,
)
from florence_onnx.commands.batch_on_ray import (
    ENGINES,
    ActorCpusOption,
    ActorGpusOption,
    ActorsOption,
    AddressOption,
    EngineOption,
    run_on_ray,
)
from florence_onnx.commands.run import find_task
from florence_onnx.images.opening import MAX_PIXELS

LINE_SECONDS = 10.0
"""Without a terminal a line is printed so often."""


def batch(
    sources: Annotated[
        list[str],
        typer.Argument(
            help="Folders (with the folders in them), image files, globs, http(s) URLs, lists of names (.txt), webdataset shards "
            "(.tar), tables (.parquet, .arrow), videos, PDF documents, or - for names on standard input.",
            metavar="SOURCE...",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="NAME.jsonl, or a folder: NAME.parquet, or any name with --form.", metavar="OUT", show_default=False
        ),
    ],
    task: Annotated[
        list[str], typer.Option(help="Task; repeatable: an image is encoded once for all.", show_default=False)
    ],
    text: Annotated[str | None, typer.Option(help="Text for tasks that take one.", show_default=False)] = None,
    region: Annotated[
        str | None,
        typer.Option(help="Region for tasks that take one: four bins or location tokens.", show_default=False),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(help=f"Form of the output: {', '.join(FORMS)}.  [default: by its name]", show_default=False),
    ] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of a file of a folder.", min=1)] = SHARD_ROWS,
    txt: Annotated[bool, typer.Option("--txt", help="Also write the text of each answer beside its image.")] = False,
    txt_dir: Annotated[
        Path | None, typer.Option(help="Write these text files to this folder.", metavar="DIR", show_default=False)
    ] = None,
    image_column: Annotated[
        str | None, typer.Option(help="Column of images of a table.  [default: by its name]", show_default=False)
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option(
            help="Column of texts for the task; in a shard, txt or a field of each .json.", show_default=False
        ),
    ] = None,
    region_column: Annotated[
        str | None, typer.Option(help="Column of regions for the task.", show_default=False)
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of ids of a table.  [default: FILE#row=N]", show_default=False)
    ] = None,
    fps: Annotated[float, typer.Option(help="Frames a second of a video.")] = 1.0,
    scenes: Annotated[
        bool, typer.Option("--scenes", help="Take the first frame of each scene of a video instead.")
    ] = False,
    dpi: Annotated[float, typer.Option(help="Pixels in an inch of a PDF page.")] = 150.0,
    max_pixels: Annotated[int, typer.Option(help="Larger images, frames and pages are errors.", min=1)] = MAX_PIXELS,
    shard: Annotated[str, typer.Option(help="Only part I of N of the images, such as 2/8.", metavar="I/N")] = "1/1",
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, each with a model.  [default: one a core for a small model on a CPU, else 1]",
            min=1,
            show_default=False,
        ),
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Remove the rows that are there and begin anew.")] = False,
    public_only: Annotated[
        bool, typer.Option("--public-only", help="URLs must lead to the public internet: for lists from strangers.")
    ] = False,
    scores: Annotated[bool, typer.Option("--scores", help="Add scores to answers.")] = False,
    model: ModelOption = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    calibration: CalibrationOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    option: GenerationOption = None,
    engine: EngineOption = "local",
    address: AddressOption = None,
    actors: ActorsOption = "1",
    actor_cpus: ActorCpusOption = 1,
    actor_gpus: ActorGpusOption = 0,
) -> None:
    """Answer any number of images into a file or a folder of rows; run again, it goes on where it was ended.

    An image without an answer is a row with `error`, and makes the exit code 1. Ctrl-C finishes the images in flight.
    """
    if engine not in ENGINES:
        raise typer.BadParameter(f"must be one of {', '.join(ENGINES)}, got {engine!r}", param_hint="--engine")
    with exit_on_error():
        options = parse_options(option, beams, max_new_tokens, scores=scores)
        loading = {
            "device": device,
            "precision": precision,
            "calibration": None if calibration is None else [str(path.resolve()) for path in calibration],
        }
        job = Job(
            sources=tuple(sources),
            out=out,
            question=Question(
                tuple(find_task(each, model, precision) for each in dict.fromkeys(task)),
                text,
                parse_region(region),
                options,
                public_only=public_only,
                max_pixels=max_pixels,
            ),
            loading=Loading(model, {name: value for name, value in loading.items() if value is not None}),
            source_options=SourceOptions(
                image_column, text_column, region_column, id_column, fps, scenes, dpi, max_pixels
            ),
            form=form,
            shard_rows=shard_rows,
            shard=_parse_shard(shard),
            txt=txt or txt_dir is not None,
            txt_dir=txt_dir,
            workers=workers,
            restart=restart,
        )
        for each in job.question.tasks:
            if each.takes_text and text is None and text_column is None:
                raise typer.BadParameter(f"{each.slug} needs --text or --text-column", param_hint="--task")
            if each.takes_region and region is None and region_column is None:
                raise typer.BadParameter(f"{each.slug} needs --region or --region-column", param_hint="--task")
        if model == DEMO:
            typer.echo(DEMO_NOTE, err=True)
        summary = run_on_ray(job, address, actors, actor_cpus, actor_gpus) if engine == "ray" else _run_here(job)
    _say(summary, out)
    if summary.is_stopped:
        raise typer.Exit(130)
    if summary.num_errors:
        raise typer.Exit(1)


def _run_here(job: Job) -> Summary:
    stop = Stop()
    with stopping_on_signals(stop, lambda said: typer.echo(said, err=True)), _reporting() as report:
        return run(job, on_row=report.row, on_begin=report.begin, stop=stop)


def _parse_shard(given: str) -> tuple[int, int]:
    number, _, count = given.partition("/")
    if not (number.isascii() and number.isdigit() and count.isascii() and count.isdigit()):
        raise typer.BadParameter(f"must be I/N, such as 2/8; got {given!r}", param_hint="--shard")
    return int(number), int(count)


def _say(summary: Summary, out: Path) -> None:
    rate = summary.num_rows / summary.seconds if summary.seconds else 0.0
    parts = [f"{summary.num_rows} rows in {summary.seconds:.1f} s ({rate:.1f} rows/s)"]
    if summary.num_done_before:
        parts.append(f"{summary.num_done_before} were there already")
    if summary.num_repeated:
        parts.append(f"{summary.num_repeated} images came twice")
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(summary.errors.items()))
    parts.append(f"{summary.num_errors} errors ({kinds})" if summary.num_errors else "no errors")
    typer.echo(f"{out}: {'; '.join(parts)}", err=True)
    if summary.is_stopped:
        typer.echo("stopped; the same command goes on", err=True)


# ------------------------------------------------------------------------------------------------------------- progress


class _Bar:
    """A bar on a terminal."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("rows", total=None, rate=0.0, errors=0)
        self._begin = time.monotonic()

    def begin(self, total: int | None, num_done: int) -> None:
        self._progress.update(self._task, total=total, completed=num_done)

    def row(self, row: Row, summary: Summary) -> None:
        rate = summary.num_rows / max(1e-9, time.monotonic() - self._begin)
        self._progress.update(self._task, advance=1, rate=rate, errors=summary.num_errors)


class _Lines:
    """A line from time to time, where there is no terminal."""

    def __init__(self) -> None:
        self._begin = self._said = time.monotonic()
        self._total: int | None = None
        self._before = 0

    def begin(self, total: int | None, num_done: int) -> None:
        self._total, self._before = total, num_done

    def row(self, row: Row, summary: Summary) -> None:
        now = time.monotonic()
        if now - self._said < LINE_SECONDS:
            return
        self._said = now
        done, rate = self._before + summary.num_rows, summary.num_rows / max(1e-9, now - self._begin)
        of = "" if self._total is None else f" of {self._total}"
        left = "" if self._total is None else f", {(self._total - done) / rate:.0f} s left"
        typer.echo(f"{done}{of} rows, {rate:.1f} rows/s, {summary.num_errors} errors{left}", err=True)


@contextmanager
def _reporting() -> Iterator[_Bar | _Lines]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f} rows/s"),
        TextColumn("{task.fields[errors]} errors"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, redirect_stdout=sys.stdout.isatty()) as progress:
        yield _Bar(progress)
