"""`florence-onnx run`: one task on any number of images."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from florence_onnx import Florence2, GenerationOptions, Prediction, Region, Tiles, tasks
from florence_onnx.answers.postprocess import PARSERS
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, Polygon, PolygonOutput
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.annotated_images import ImageFolder, open_folder
from florence_onnx.commands.arguments import (
    DEMO_NOTE,
    BeamsOption,
    CalibrationOption,
    DeviceOption,
    FitOption,
    GenerationOption,
    ImageSizeOption,
    MaxNewTokensOption,
    ModelOption,
    PrecisionOption,
    TilesOption,
    constrained,
    exit_on_error,
    parse_options,
    parse_region,
    parse_size,
    parse_tiles,
)
from florence_onnx.commands.captions import CaptionFiles, check_options
from florence_onnx.commands.image_list import expand
from florence_onnx.errors import ImageError
from florence_onnx.generation.progress import Truncated
from florence_onnx.images import url
from florence_onnx.images.placement import check_fit
from florence_onnx.limits import Limits
from florence_onnx.prompts import to_task
from florence_onnx.runtime.providers import BF16


def run(
    task: Annotated[
        str,
        typer.Argument(
            help="Slug (object-detection) or token (<OD>); for a list see `florence-onnx tasks`. Left out with --prompt."
        ),
    ],
    images: Annotated[
        list[str] | None,
        typer.Argument(
            help="Paths, folders of images, http(s) URLs or data: URIs.", metavar="IMAGE...", show_default=False
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="Prompt of any wording, such as <GENERATE_TAGS>, instead of a task.", show_default=False),
    ] = None,
    parser: Annotated[
        str | None,
        typer.Option(help=f"How to read the answer to --prompt: {', '.join(PARSERS)}.", show_default=False),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text input, for tasks that need one.")] = None,
    region: Annotated[
        str | None,
        typer.Option(
            help="Region, for tasks that need one, in thousandths of width and height (0 to 999), or its location tokens.",
            metavar="X1,Y1,X2,Y2",
        ),
    ] = None,
    tiles: TilesOption = None,
    model: ModelOption = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    image_size: ImageSizeOption = None,
    fit: FitOption = "stretch",
    calibration: CalibrationOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    option: GenerationOption = None,
    scores: Annotated[
        bool, typer.Option("--scores", help="Say how sure the model is: of each box, quad, outline, and of texts.")
    ] = False,
    min_score: Annotated[
        float | None, typer.Option(help="Leave out boxes, quads and outlines of a lower score.", min=0, max=1)
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="The only labels that the answer may have, such as car,bus.", metavar="LABEL,…"),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option(help="Texts of which the answer is one, such as yes,no.", metavar="TEXT,…"),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Seconds after which the answer to an image ends as far as it goes.",
            metavar="SECONDS",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, one per line.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Write annotated images to this folder.", metavar="DIR")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Also search the folders in a folder.")] = False,
    txt: Annotated[
        bool, typer.Option("--txt", help="Write each answer to a text file beside its image, unless there is one.")
    ] = False,
    txt_dir: Annotated[
        Path | None, typer.Option(help="With --txt: write the text files to this folder.", metavar="DIR")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="With --txt: replace text files that are there.")
    ] = False,
) -> None:
    """Run one task on images.

    A folder stands for the images in it, sorted by path. An image that cannot be read does not stop the others, but
    makes the exit code 1.
    """
    with exit_on_error():
        options = parse_options(option, beams, max_new_tokens, scores=scores or min_score is not None)
        if parser is not None and prompt is None:
            raise typer.BadParameter("only the answer to --prompt can be read in another way", param_hint="--parser")
        images = _read_images(task, images, has_task=prompt is None)
        chosen = find_task(task, model, precision) if prompt is None else to_task(prompt, parser)
        request = _Request(chosen, text, parse_region(region), options, min_score, parse_tiles(tiles), deadline)
        request = replace(request, options=constrained(request.options, request.task, labels, choices))
        Limits(deadline)  # a wrong one fails before the model is loaded
        request.task.format_prompt(text_input=request.text, region=request.region)  # fails before the model is loaded
        check_options(request.task, txt=txt, folder=txt_dir, overwrite=overwrite)
        folder = open_folder(draw, request.task)
        images = expand(images, recursive=recursive)
        captions = CaptionFiles(txt_dir, images) if txt else None
        if captions is not None and not overwrite:
            images = captions.missing(images)
        if not images:
            return
        florence = Florence2.from_pretrained(
            model,
            device=device,
            precision=precision,
            image_size=parse_size(image_size),
            fit=check_fit(fit),
            calibration=calibration,
        )
        if model == DEMO:
            typer.echo(DEMO_NOTE, err=True)
        report = _JsonReport(with_scores=bool(options.scores)) if as_json else _TextReport()
        num_failed = _run_all(florence, request, images, report, folder, captions)
    if num_failed:
        typer.echo(f"{num_failed} of {len(images)} images could not be read", err=True)
        raise typer.Exit(1)


def _read_images(task: str, images: list[str] | None, *, has_task: bool) -> list[str]:
    """The images of the command line, on which the task may have been left out."""
    found = [*([] if has_task else [task]), *(images or [])]
    if not found:
        raise typer.BadParameter("give at least one image after the task", param_hint="IMAGE")
    return found


def find_task(name: str, model: str, precision: str | None) -> tasks.Task[Any]:
    """A task of Florence-2 or of the model's bundle, whose graphs are not loaded for it.

    Raises:
        UnknownTaskError: There is none of that name.
        BundleError: The bundle cannot be read.
    """
    if any(name in (task.slug, task.token) for task in tasks.TASKS.values()) or model == DEMO:
        return tasks.get(name)
    return tasks.get(name, hub.resolve(model, precision=None if precision == BF16 else precision).tasks)


_LIMITS: dict[Truncated, str] = {
    True: "token limit: raise --max-new-tokens",
    "deadline": "deadline",
    "cancelled": "call's end",
}
"""What cut an answer off."""


@dataclass(frozen=True)
class _Request:
    """The arguments of `Florence2.run` that are the same for all images."""

    task: tasks.Task[Any]
    text: str | None
    region: Region | None
    options: GenerationOptions
    min_score: float | None = None
    tiles: Tiles | None = None
    deadline: float | None = None

    def run(self, model: Florence2, image: str) -> Prediction[Any]:
        found = model.run(
            self.task,
            image,
            text_input=self.text,
            region=self.region,
            tiles=self.tiles,
            options=self.options,
            deadline=self.deadline,
        )
        return found if self.min_score is None else found.above(self.min_score)


def _run_all(
    model: Florence2,
    request: _Request,
    images: Sequence[str],
    report: _JsonReport | _TextReport,
    folder: ImageFolder | None,
    captions: CaptionFiles | None,
) -> int:
    """Runs the request on all images; returns the number of images that could not be read."""
    num_failed = 0
    for image in with_progress(images):
        try:
            prediction = request.run(model, image)
        except ImageError as error:
            num_failed += 1
            report.failure(image, error)
            continue
        report.answer(image, prediction)
        if folder is not None:
            folder.add(image, prediction)
        if captions is not None:
            captions.write(image, prediction)
    return num_failed


def with_progress(images: Sequence[str]) -> Iterator[str]:
    """The images, with a bar on standard error while they are worked on, if that is a terminal."""
    console = Console(stderr=True)
    if len(images) < 2 or not console.is_terminal:
        yield from images
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # rich redirects standard output to the stream of the bar: needed if both are the same terminal, but answers that
    # are piped into a file must not end up on the terminal
    is_shared = sys.stdout.isatty()
    with Progress(*columns, console=console, transient=True, redirect_stdout=is_shared) as progress:
        yield from progress.track(images, description="images")


class _JsonReport:
    """Prints one JSON object per line."""

    def __init__(self, *, with_scores: bool) -> None:
        self._with_scores = with_scores

    def answer(self, image: str, prediction: Prediction[Any]) -> None:
        """Writes `{"image": …, "results": …, "truncated": …}`, the scores, and the results of `alternatives`
        and `choice_logprobs` if there are any."""
        answer = prediction.to_dict(with_scores=self._with_scores)
        answer.pop("image", None)  # the annotated one, which is not asked for
        line = {"image": image, **answer, "truncated": prediction.truncated}
        if prediction.alternatives:
            line["alternatives"] = [other.to_dict()["results"] for other in prediction.alternatives]
        if prediction.choice_logprobs is not None:
            line["choice_logprobs"] = dict(prediction.choice_logprobs)
        self._write(line)

    def failure(self, image: str, error: ImageError) -> None:
        """Writes `{"image": …, "error": …}`, and the error to standard error too."""
        self._write({"image": image, "error": str(error)})
        typer.echo(f"{url.shorten(image)}: {error}", err=True)

    def _write(self, line: dict[str, Any]) -> None:
        typer.echo(json.dumps(line, ensure_ascii=False))
        sys.stdout.flush()  # a reader of the pipe gets each answer at once


class _TextReport:
    """Prints answers for people."""

    def answer(self, image: str, prediction: Prediction[Any]) -> None:
        """Writes the image's name, and one line for each box, outline or line of text."""
        typer.echo(f"{url.shorten(image)}:")
        for line in _describe(prediction.results):
            typer.echo(f"  {line}")
        if prediction.text_score is not None:
            score = prediction.text_score
            typer.echo(f"  (token probability: {score.mean:.3f} on average, {score.least:.3f} at least)")
        for number, other in enumerate(prediction.alternatives, start=2):
            typer.echo(f"  answer {number}:")
            for line in _describe(other.results):
                typer.echo(f"    {line}")
        for choice, log_prob in (prediction.choice_logprobs or {}).items():
            typer.echo(f"    {log_prob:8.3f}  {choice}")
        if prediction.truncated:
            typer.echo(f"  (cut off at the {_LIMITS[prediction.truncated]})", err=True)

    def failure(self, image: str, error: ImageError) -> None:
        """Writes the error to standard error."""
        typer.echo(f"{url.shorten(image)}: {error}", err=True)


def _describe(results: object) -> list[str]:
    if isinstance(results, BoundingBoxes):
        return [*describe_boxes(results.bboxes), *map(_describe_polygon, results.polygons)] or ["nothing found"]
    if isinstance(results, OCRBoundingBox):
        return describe_boxes(results.quad_boxes) or ["no text found"]
    if isinstance(results, PolygonOutput):
        return [_describe_polygon(polygon) for polygon in results.polygons] or ["nothing found"]
    return str(results).splitlines() or [""]


def describe_boxes(boxes: Sequence[Any]) -> list[str]:
    """A line for each box or quad, in columns."""
    width = max((len(box.label) for box in boxes), default=0)
    return [
        f"{box.label:{width}}  x {box.x:7.1f}  y {box.y:7.1f}  w {box.w:7.1f}  h {box.h:7.1f}{_score(box)}".lstrip()
        for box in boxes
    ]


def _score(item: Any) -> str:
    return "" if item.score is None else f"  score {item.score:.3f}"


def _describe_polygon(polygon: Polygon) -> str:
    if not polygon.points:
        return f"{polygon.label} empty outline".lstrip()
    xs, ys = [point.x for point in polygon.points], [point.y for point in polygon.points]
    span = f"x {min(xs):.1f} to {max(xs):.1f}, y {min(ys):.1f} to {max(ys):.1f}"
    return f"{polygon.label} outline of {len(polygon.points)} points, {span}{_score(polygon)}".lstrip()
