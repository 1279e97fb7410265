"""Options, argument parsing and error handling that the commands share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from florence_onnx.answers.locations import Region
from florence_onnx.bundles.bundle import parse_image_size
from florence_onnx.errors import FlorenceError, OptionsError
from florence_onnx.generation import option_names
from florence_onnx.generation.options import GenerationOptions, merge
from florence_onnx.grammar import Choice, Grammar
from florence_onnx.tasks import Task
from florence_onnx.tiling.tiles import Tiles

DEMO_NOTE = "The demo model only knows drawn shapes and words; for photographs, use run with --model."
MODEL_HELP = "Bundle directory, hub repository (owner/name), or demo."
PRECISION_HELP = (
    "Precision to load if the model has several: fp32, fp16, int8, …; in the layout of transformers.js also by module, such as "
    "vision_encoder=fp16,decoder=q4.  [default: best for the device]"
)
DEVICE_HELP = "auto, cpu, cuda, tensorrt or openvino."

ModelOption = Annotated[str, typer.Option(help=MODEL_HELP)]
BundleArgument = Annotated[str, typer.Argument(help=MODEL_HELP)]
PrecisionOption = Annotated[str | None, typer.Option(help=PRECISION_HELP)]
DeviceOption = Annotated[str, typer.Option(help=DEVICE_HELP)]
ImageSizeOption = Annotated[
    str | None,
    typer.Option(
        help="Pixels at which images are read: the side of a square or WIDTHxHEIGHT; `info` lists the model's sizes.  "
        "[default: the model's]",
        metavar="SIZE",
    ),
]
FitOption = Annotated[
    str,
    typer.Option(help="stretch images to that size, as transformers does, or pad them to keep their aspect ratio."),
]
GenerationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        help="Generation option in JSON, such as do_sample=true or suppress_tokens=[5,6]; repeatable.",
        metavar="NAME=VALUE",
    ),
]
CalibrationOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="File of `evaluate --write-calibration` that turns scores into probabilities; repeatable, one a task.",
        metavar="FILE",
        show_default=False,
    ),
]
BeamsOption = Annotated[
    int | None, typer.Option(help="Beam search width; 1 is greedy search.  [default: the model's]", show_default=False)
]
MaxNewTokensOption = Annotated[
    int | None, typer.Option(help="Maximum tokens of an answer.  [default: the model's]", show_default=False)
]
TilesOption = Annotated[
    str | None,
    typer.Option(
        help="Ask a large image in tiles of so many pixels, such as 768; then the least overlap, such as 768,0.15, and "
        "no-whole to leave the whole image out: 768,0.15,no-whole.",
        metavar="SIZE[,OVERLAP[,no-whole]]",
        show_default=False,
    ),
]


def parse_tiles(value: str | None) -> Tiles | None:
    """Parses the value of `--tiles`, such as `768` or `768,0.15,no-whole`; None gives None.

    Raises:
        typer.BadParameter: It is malformed.
        InputError: A number is out of range.
    """
    if value is None:
        return None
    size, *others = value.split(",")
    try:
        given: dict[str, Any] = {"size": int(size)}
        if others[1:] not in ([], ["no-whole"]):
            raise ValueError
        if others:
            given["overlap"] = float(others[0])
    except ValueError:
        raise typer.BadParameter(
            f"must be a number of pixels, and an overlap from 0 to 0.75, such as 768,0.15; got {value!r}",
            param_hint="--tiles",
        ) from None
    return Tiles(**given, whole=len(others) < 2)


def parse_size(value: str | None) -> tuple[int, int] | None:
    """Parses the value of `--image-size`; returns None for None.

    Raises:
        InputError: It is not a size.
    """
    return None if value is None else parse_image_size(value)


def parse_region(value: str | None) -> Region | None:
    """Parses the value of `--region`, such as `52,332,932,774` or `<loc_52><loc_332><loc_932><loc_774>`; None gives None.

    Raises:
        typer.BadParameter: It is neither four integers nor location tokens.
        RegionError: They are not a region.
    """
    if value is None:
        return None
    if "<" in value:
        return Region.from_text(value)
    try:
        x1, y1, x2, y2 = (int(part) for part in value.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"must be four integer bins from 0 to 999, such as 52,332,932,774; got {value!r}", param_hint="--region"
        ) from None
    return Region(x1, y1, x2, y2)


def parse_options(
    given: Sequence[str] | None, beams: int | None, max_new_tokens: int | None = None, *, scores: bool = False
) -> GenerationOptions:
    """Reads the values of `--option`, with `--beams`, `--max-new-tokens` and `--scores` over them.

    Raises:
        OptionsError: One is malformed, unknown or out of range.
    """
    options = option_names.parse_options(parse_assignments(given or ()))
    return merge(options, GenerationOptions(beams, max_new_tokens, scores=scores or None))


def parse_assignments(given: Sequence[str], *, can_be_empty: bool = False) -> dict[str, Any]:
    """Reads arguments such as `temperature=0.7`: option names and JSON values; `early_stopping=never` needs no quotes.

    Args:
        given: The arguments.
        can_be_empty: Whether `NAME=` is allowed, which gives None.

    Raises:
        OptionsError: One has no `=`, no value, or an option is given twice.
    """
    found: dict[str, Any] = {}
    for each in given:
        name, equals, text = each.partition("=")
        name = name.strip().replace("-", "_")
        if not name or not equals or not (text or can_be_empty):
            raise OptionsError(f"an option is NAME=VALUE, such as num_beams=1; got {each!r}")
        if name in found:
            raise OptionsError(f"option {name} is given twice")
        try:
            found[name] = json.loads(text) if text else None
        except ValueError:
            found[name] = {"True": True, "False": False}.get(text, text)
    return found


def constrained(
    options: GenerationOptions, task: Task[Any], labels: str | None, choices: str | None
) -> GenerationOptions:
    """Adds `--labels` or `--choices` to generation options.

    Args:
        options: Those given otherwise.
        task: Whose answer is constrained.
        labels: Divided by commas; blanks around them do not count.
        choices: See `labels`.

    Raises:
        OptionsError: There is more than one constraint, or the task's answer cannot have it.
    """
    given = [name for name, value in (("--labels", labels), ("--choices", choices)) if value is not None]
    if options.constrain is not None:
        given.append("--option constrain")
    if len(given) > 1:
        raise OptionsError(f"{' and '.join(given)} exclude each other")
    if labels is not None:
        return replace(options, constrain=Grammar.for_task(task, labels.split(",")))
    if choices is not None:
        return replace(options, constrain=Choice(choices.split(","), has_region=task.takes_region))
    return options


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Turns a `FlorenceError` into its message on standard error and exit code 2."""
    try:
        yield
    except FlorenceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
