"""`florence-onnx detect`: a list of classes in any number of images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from florence_onnx import Detections, Florence2
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.annotated_images import open_folder
from florence_onnx.commands.arguments import (
    DEMO_NOTE,
    BeamsOption,
    CalibrationOption,
    DeviceOption,
    GenerationOption,
    ModelOption,
    PrecisionOption,
    TilesOption,
    exit_on_error,
    parse_options,
    parse_tiles,
)
from florence_onnx.commands.image_list import expand
from florence_onnx.commands.run import describe_boxes, find_task, with_progress
from florence_onnx.detecting.absence import DEFAULT_RULE, RULES
from florence_onnx.errors import ImageError
from florence_onnx.images import url


def detect(
    classes: Annotated[str, typer.Argument(help="Names of classes with commas between them: 'car,a red kite'.")],
    images: Annotated[
        list[str], typer.Argument(help="Paths, folders of images, http(s) URLs or data: URIs.", metavar="IMAGE...")
    ],
    task: Annotated[
        str, typer.Option(help="Task that takes text and answers with boxes.")
    ] = "open-vocabulary-detection",
    min_score: Annotated[float, typer.Option(help="Drop boxes with a lower score.")] = 0.0,
    nms: Annotated[
        float,
        typer.Option(help="Drop boxes that overlap a better one of their class by more than this share; 1: none."),
    ] = 0.5,
    absent: Annotated[
        str, typer.Option(help=f"Rule by which classes that are not there are recognised: {', '.join(RULES)}.")
    ] = DEFAULT_RULE,
    threshold: Annotated[
        float | None, typer.Option(help="Least value by that rule.  [default: the rule's]", show_default=False)
    ] = None,
    tiles: TilesOption = None,
    calibration: CalibrationOption = None,
    model: ModelOption = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    beams: BeamsOption = None,
    option: GenerationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per image, one per line.")] = False,
    draw: Annotated[Path | None, typer.Option(help="Write annotated images to this folder.", metavar="DIR")] = None,
    recursive: Annotated[bool, typer.Option("--recursive", help="Also search the folders in a folder.")] = False,
) -> None:
    """Find the objects of a list of classes, and say which classes are not there.

    An image that cannot be read does not stop the others, but makes the exit code 1.
    """
    with exit_on_error():
        options = parse_options(option, beams)
        chosen, divided = find_task(task, model, precision), parse_tiles(tiles)
        names = classes.split(",")
        found = expand(images, recursive=recursive)
        folder = open_folder(draw, chosen)
        florence = Florence2.from_pretrained(model, device=device, precision=precision, calibration=calibration)
        if model == DEMO:
            typer.echo(DEMO_NOTE, err=True)
        num_failed = 0
        for image in with_progress(found):
            try:
                detections = florence.detect(
                    image,
                    names,
                    task=chosen,
                    min_score=min_score,
                    nms=nms,
                    absent=absent,  # type: ignore[arg-type]  # checked there
                    threshold=threshold,
                    tiles=divided,
                    options=options,
                )
            except ImageError as error:
                num_failed += 1
                _report_failure(image, error, as_json=as_json)
                continue
            _report(image, detections, as_json=as_json)
            if folder is not None:
                folder.add(image, detections)
    if num_failed:
        typer.echo(f"{num_failed} of {len(found)} images could not be read", err=True)
        raise typer.Exit(1)


def _report(image: str, detections: Detections, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"image": image, **detections.to_dict()}, ensure_ascii=False))
        sys.stdout.flush()  # a reader of the pipe gets each answer at once
        return
    typer.echo(f"{url.shorten(image)}:")
    boxes = detections.bboxes
    for line, box in zip(describe_boxes(boxes), boxes, strict=True):
        typer.echo(f"  {line}  score {box.score or 0:.3f}")
    for each in detections.classes:
        if not each.bboxes:
            typer.echo(f"  {each.name}: not found")


def _report_failure(image: str, error: ImageError, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"image": image, "error": str(error)}, ensure_ascii=False))
    typer.echo(f"{url.shorten(image)}: {error}", err=True)
