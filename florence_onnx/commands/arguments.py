"""What the commands share: options, the region on the command line, and errors that end a command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated

import typer

from florence_onnx.answers.locations import Region
from florence_onnx.errors import FlorenceError

DEMO_NOTE = "The demo model knows drawn shapes and words only; for photographs, pass --model to run."

ModelOption = Annotated[str, typer.Option(help="Bundle directory, hub repository (owner/name), or demo.")]
BundleArgument = Annotated[str, typer.Argument(help="Bundle directory, hub repository (owner/name), or demo.")]
PrecisionOption = Annotated[
    str | None, typer.Option(help="Which files to take where a model has several: fp32, fp16, …")
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, …")]


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
