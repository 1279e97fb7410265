"""`florence-onnx evaluate`: how good boxes and their scores are, on images whose contents are known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from florence_onnx import Florence2
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import (
    BeamsOption,
    CalibrationOption,
    DeviceOption,
    GenerationOption,
    ModelOption,
    PrecisionOption,
    exit_on_error,
    parse_options,
)
from florence_onnx.commands.run import find_task, with_progress
from florence_onnx.errors import InputError
from florence_onnx.evaluating import plotting
from florence_onnx.evaluating.asking import ask, check
from florence_onnx.evaluating.coco import Figures, read_ground_truth
from florence_onnx.evaluating.measuring import Evaluation
from florence_onnx.evaluating.measuring import evaluate as measure


def evaluate(
    coco: Annotated[Path, typer.Option(help="Ground truth in COCO's form.", metavar="FILE", show_default=False)],
    images: Annotated[Path, typer.Option(help="Folder of its images.", metavar="DIR", show_default=False)],
    task: Annotated[
        str | None,
        typer.Option(
            help="Task that answers with boxes.  [default: object-detection, with --each-class open-vocabulary-detection]",
            show_default=False,
        ),
    ] = None,
    each_class: Annotated[
        bool, typer.Option("--each-class", help="Ask for the names of the categories, one by one, as detect does.")
    ] = False,
    limit: Annotated[int | None, typer.Option(help="Use only so many images.", min=1, show_default=False)] = None,
    write_calibration: Annotated[
        Path | None,
        typer.Option(
            help="Fit a calibration of the scores on every second image, judge it on the others, and write it here.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw how reliable the scores are: a .png, .svg or .pdf file.", metavar="FILE", show_default=False
        ),
    ] = None,
    calibration: CalibrationOption = None,
    model: ModelOption = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
    beams: BeamsOption = None,
    option: GenerationOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Compare a model's boxes with COCO's ground truth: AP, AR, and whether scores say how often boxes are right.

    Images without an answer do not count, are named, and make the exit code 1. Needs the extra `evaluate`.
    """
    with exit_on_error():
        options = parse_options(option, beams)
        default = "open-vocabulary-detection" if each_class else "object-detection"
        chosen = find_task(task or default, model, precision)
        check(chosen, each_class=each_class)
        if calibration and write_calibration:
            raise InputError("--write-calibration fits the model's own scores: leave --calibration out")
        truth = read_ground_truth(coco)
        if not images.is_dir():
            raise InputError(f"{images} is no folder")
        florence = Florence2.from_pretrained(model, device=device, precision=precision, calibration=calibration)
        ids = list(truth.images)[:limit]
        answers = ask(florence, truth, images, ids, chosen, each_class=each_class, options=options)
        asked = [answer for _, answer in zip(with_progress(list(map(str, ids))), answers, strict=True)]
        fits = write_calibration is not None
        found = measure(truth, asked, chosen.slug, florence.digest, calibrate=fits)
        if write_calibration is not None and found.fitted is not None:
            found.fitted.calibration.write(write_calibration)
        if plot is not None:
            fitted = found.fitted
            parts = (
                {"all images": found.reliability}
                if fitted is None
                else {"before": fitted.before, "after": fitted.after}
            )
            plotting.plot(parts, plot)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), ensure_ascii=False))
    else:
        _report(found)
    for name, error in found.errors.items():
        typer.echo(f"{name}: {error}", err=True)
    if found.errors:
        typer.echo(f"{len(found.errors)} of {len(ids)} images have no answer", err=True)
        raise typer.Exit(1)


def _report(found: Evaluation) -> None:
    width = max(map(len, (*found.by_class, "all classes")))
    typer.echo(f"{'':{width}}      AP    AP50    AP75      AR  objects")
    typer.echo(_line("all classes", found.figures, width))
    for name, each in found.by_class.items():
        typer.echo(_line(name, each, width))
    typer.echo(
        f"{found.num_images} images, {found.reliability.count} boxes, expected calibration error {found.reliability.ece:.3f}"
    )
    if found.other_labels:
        names = list(found.other_labels)
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        typer.echo(
            f"{sum(found.other_labels.values())} boxes have labels that are no category and do not count: "
            f"{', '.join(names[:5])}{more}"
        )
    if found.fitted is not None:
        fitted = found.fitted
        typer.echo(
            f"calibration fitted on {fitted.calibration.num_boxes} boxes; on {fitted.before.count} others the error was "
            f"{fitted.before.ece:.3f} before and is {fitted.after.ece:.3f} with it"
        )


def _line(name: str, figures: Figures, width: int) -> str:
    values = (figures.ap, figures.ap50, figures.ap75, figures.ar)
    return (
        f"{name:{width}}"
        + "".join("       -" if each is None else f"{each:8.3f}" for each in values)
        + f"{figures.num_objects:9}"
    )
