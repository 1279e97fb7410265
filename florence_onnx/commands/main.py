"""The command line: `demo`, `run`, `tasks`, `info`, `build-engines` and those of other packages, `serve` and `bench-fal`.

Results go to standard output, everything else (progress, notes, errors) to standard error. Exit codes: 0 all well, 1
some pictures could not be read, 2 stopped because of the arguments, the model or the disk.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from florence_onnx import Florence2, GenerationOptions, Prediction, Region, __version__, tasks
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, Polygon, PolygonOutput
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.errors import FlorenceError, ImageError, InputError
from florence_onnx.images import url
from florence_onnx.runtime.tensorrt import DEFAULT_MAX_BATCH

_DEMO_NOTE = "The demo model knows drawn shapes and words only; for photographs, pass --model to run."
SAMPLES = Path(__file__).parents[1] / "demo" / "samples"

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)

_ModelOption = Annotated[str, typer.Option(help="Bundle directory, hub repository (owner/name), or demo.")]
_BundleArgument = Annotated[str, typer.Argument(help="Bundle directory, hub repository (owner/name), or demo.")]
_PrecisionOption = Annotated[
    str | None, typer.Option(help="Which files to take where a model has several: fp32, fp16, …")
]
_DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def florence_onnx(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Florence-2 on ONNX Runtime: captions, boxes, outlines and text of pictures."""


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where the annotated picture goes.")] = Path("florence-onnx-demo.png"),
    device: _DeviceOption = "auto",
) -> None:
    """Find the shapes in a sample picture with the built-in demo model."""
    sample = SAMPLES / json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]["file"]
    with exit_on_error():
        model = Florence2.from_pretrained(DEMO, device=device)
        prediction = model.run(tasks.OBJECT_DETECTION, sample)
        _save(prediction, output)
    typer.echo(json.dumps(prediction.to_dict(), indent=2, ensure_ascii=False))
    typer.echo(f"{sample.name}, annotated: {output}", err=True)
    typer.echo(_DEMO_NOTE, err=True)


@app.command()
def run(
    task: Annotated[str, typer.Argument(help="Slug (object-detection) or token (<OD>); `tasks` lists them.")],
    images: Annotated[list[str], typer.Argument(help="Paths, http(s) URLs or data: URIs.", metavar="IMAGE…")],
    text: Annotated[str | None, typer.Option(help="Text, for the tasks that need one.")] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="Region for the tasks that need one: bins 0 to 999 of width and height.", metavar="X1,Y1,X2,Y2"
        ),
    ] = None,
    model: _ModelOption = DEMO,
    precision: _PrecisionOption = None,
    device: _DeviceOption = "auto",
    beams: Annotated[int | None, typer.Option(help="Beams; 1 is greedy. Default: as the model says.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line and image.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Folder for the annotated pictures.", metavar="DIR")] = None,
) -> None:
    """Ask one task about many pictures; one that cannot be read does not stop the rest."""
    with exit_on_error():
        question = _Question(tasks.get(task), text, parse_region(region), GenerationOptions(beams, max_new_tokens))
        question.task.format_prompt(text_input=question.text, region=question.region)
        gallery = _open_gallery(draw, question.task)
        florence = Florence2.from_pretrained(model, device=device, precision=precision)
        if model == DEMO:
            typer.echo(_DEMO_NOTE, err=True)
        num_failed = _answer_all(florence, question, images, _JsonReport() if as_json else _TextReport(), gallery)
    if num_failed:
        typer.echo(f"{num_failed} of {len(images)} pictures could not be read", err=True)
        raise typer.Exit(1)


@app.command(name="tasks")
def list_tasks() -> None:
    """List the tasks and what each needs."""
    table = Table("task", "token", "needs", "prompt", box=None, header_style="bold", pad_edge=False)
    for task in tasks.TASKS.values():
        needs = {"nothing": "", "text": "--text", "region": "--region"}[task.needs]
        table.add_row(task.slug, task.token, needs, task.prompt)
    # when piped, rich would fold the rows at 80 columns
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)


@app.command()
def info(
    model: _BundleArgument = DEMO,
    precision: _PrecisionOption = None,
    device: _DeviceOption = "auto",
) -> None:
    """Show a model's sizes, precision, origin, what its verification measured and what memory it needs on a card, as JSON."""
    with exit_on_error():
        florence = Florence2.from_pretrained(model, device=device, precision=precision)
        typer.echo(json.dumps(florence.info(), indent=2, ensure_ascii=False))


@app.command(name="build-engines")
def build_engines(
    model: _BundleArgument = DEMO,
    precision: _PrecisionOption = None,
    max_batch: Annotated[
        int, typer.Option(help="Most prompts that the engines take together.", min=1)
    ] = DEFAULT_MAX_BATCH,
) -> None:
    """Build the TensorRT engines of a bundle for the card of this machine, for `--device tensorrt` and `auto`."""
    from florence_onnx import loading
    from florence_onnx.bundles import hub

    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # what is being built: it takes minutes
    with exit_on_error():
        found = hub.resolve(model, precision=precision, preferred=("fp16", "fp32"))
        engines = loading.build_engines(found, max_batch)
    typer.echo(engines.folder)


_ELSEWHERE: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""Of a command whose options are declared in a package of its own, which is imported when it is asked for."""


@app.command(**_ELSEWHERE)
def serve(context: typer.Context) -> None:
    """Serve fal's API, and a page to try it; needs the extra `serve`."""
    from florence_onnx.commands import serve as command

    raise typer.Exit(command.app(context.args, prog_name=context.command_path, standalone_mode=False) or 0)


@app.command(name="bench-fal", **_ELSEWHERE)
def bench_fal(context: typer.Context) -> None:
    """Compare fal and this package: times, prices and answers; needs the extra `fal`."""
    from florence_onnx.commands import bench_fal as command

    raise typer.Exit(command.app(context.args, prog_name=context.command_path, standalone_mode=False) or 0)


# --- one question, many pictures -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Question:
    task: tasks.Task[Any]
    text: str | None
    region: Region | None
    options: GenerationOptions

    def ask(self, model: Florence2, picture: str) -> Prediction[Any]:
        return model.run(self.task, picture, text_input=self.text, region=self.region, options=self.options)


def _answer_all(
    model: Florence2,
    question: _Question,
    pictures: Sequence[str],
    report: _JsonReport | _TextReport,
    gallery: _Gallery | None,
) -> int:
    """Returns how many pictures could not be read."""
    num_failed = 0
    for picture in _with_progress(pictures):
        try:
            prediction = question.ask(model, picture)
        except ImageError as error:
            num_failed += 1
            report.failure(picture, error)
            continue
        report.answer(picture, prediction)
        if gallery is not None:
            gallery.add(picture, prediction)
    return num_failed


def _with_progress(pictures: Sequence[str]) -> Iterator[str]:
    console = Console(stderr=True)
    if len(pictures) < 2 or not console.is_terminal:
        yield from pictures
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # rich sends redirected output to the bar's stream: right where both are the same terminal, lost where a file waits
    is_shared = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=is_shared) as progress:
        yield from progress.track(pictures, description="pictures")


class _JsonReport:
    """One JSON object a line."""

    def answer(self, picture: str, prediction: Prediction[Any]) -> None:
        """Writes `{"image": …, "results": …}`."""
        self._write({"image": picture, "results": prediction.to_dict()["results"]})

    def failure(self, picture: str, error: ImageError) -> None:
        """Writes `{"image": …, "error": …}`, and the error to standard error too."""
        self._write({"image": picture, "error": str(error)})
        typer.echo(f"{url.shorten(picture)}: {error}", err=True)

    def _write(self, line: dict[str, Any]) -> None:
        typer.echo(json.dumps(line, ensure_ascii=False))
        sys.stdout.flush()  # whoever reads the pipe sees each answer when it is there


class _TextReport:
    """Answers for people."""

    def answer(self, picture: str, prediction: Prediction[Any]) -> None:
        """Writes the picture's name and one line for each thing found."""
        typer.echo(f"{url.shorten(picture)}:")
        for line in _describe(prediction.results):
            typer.echo(f"  {line}")
        if prediction.truncated:
            typer.echo("  (cut off by the token limit: raise --max-new-tokens)", err=True)

    def failure(self, picture: str, error: ImageError) -> None:
        """Writes the error to standard error."""
        typer.echo(f"{url.shorten(picture)}: {error}", err=True)


def _describe(results: object) -> list[str]:
    if isinstance(results, BoundingBoxes):
        return [*_describe_boxes(results.bboxes), *map(_describe_polygon, results.polygons)] or ["nothing found"]
    if isinstance(results, OCRBoundingBox):
        return _describe_boxes(results.quad_boxes) or ["no text found"]
    if isinstance(results, PolygonOutput):
        return [_describe_polygon(polygon) for polygon in results.polygons] or ["nothing found"]
    return str(results).splitlines() or [""]


def _describe_boxes(boxes: Sequence[Any]) -> list[str]:
    width = max((len(box.label) for box in boxes), default=0)
    return [
        f"{box.label:{width}}  x {box.x:7.1f}  y {box.y:7.1f}  w {box.w:7.1f}  h {box.h:7.1f}".lstrip() for box in boxes
    ]


def _describe_polygon(polygon: Polygon) -> str:
    if not polygon.points:
        return f"{polygon.label} empty outline".lstrip()
    xs, ys = [point.x for point in polygon.points], [point.y for point in polygon.points]
    span = f"x {min(xs):.1f} to {max(xs):.1f}, y {min(ys):.1f} to {max(ys):.1f}"
    return f"{polygon.label} outline of {len(polygon.points)} points, {span}".lstrip()


# --- annotated pictures --------------------------------------------------------------------------------------------


@dataclass
class _Gallery:
    """A folder for annotated pictures, none of which replaces another of the same run."""

    folder: Path
    suffix: str
    _names: set[str] = field(default_factory=set)

    def add(self, picture: str, prediction: Prediction[Any]) -> None:
        """Draws and writes one."""
        name = f"{self._find_stem(picture)}.{self.suffix}.png"
        self._names.add(name)
        _save(prediction, self.folder / name)

    def _find_stem(self, picture: str) -> str:
        path = urlsplit(picture).path if url.is_url(picture) else picture
        stem = "data" if url.is_data_uri(picture) else Path(path).stem or "image"
        number, candidate = 1, stem
        while f"{candidate}.{self.suffix}.png" in self._names:
            number += 1
            candidate = f"{stem}-{number}"
        return candidate


def _open_gallery(folder: Path | None, task: tasks.Task[Any]) -> _Gallery | None:
    if folder is None:
        return None
    if not task.has_image:
        raise typer.BadParameter(f"{task.slug} answers with text: there is nothing to draw", param_hint="--draw")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {folder}: {error.strerror}", param_hint="--draw") from None
    return _Gallery(folder, task.slug)


def _save(prediction: Prediction[Any], path: Path) -> None:
    try:
        prediction.draw().save(path)
    except (OSError, ValueError) as error:  # ValueError: a name whose ending is no picture format
        raise InputError(f"cannot write {path}: {error}") from None


# --- arguments and errors ------------------------------------------------------------------------------------------


def parse_region(value: str | None) -> Region | None:
    """Reads the value of `--region`, such as 52,332,932,774; None stays None."""
    if value is None:
        return None
    try:
        x1, y1, x2, y2 = (int(part) for part in value.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"must be four integer bins from 0 to 999, such as 52,332,932,774; got {value!r}", param_hint="--region"
        ) from None
    return Region(x1, y1, x2, y2)


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Our errors end the command with their message instead of a traceback."""
    try:
        yield
    except FlorenceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
