"""`florence-onnx configure`: generation options that a bundle has by default."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from florence_onnx.bundles.configuration import configure as write_configuration
from florence_onnx.commands.arguments import PrecisionOption, exit_on_error, parse_assignments


def configure(
    bundle: Annotated[str, typer.Argument(help="Bundle directory.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            help="Generation options in JSON, such as num_beams=1; NAME= goes back to the checkpoint's. None: shows them.",
            metavar="[NAME=VALUE]…",
        ),
    ] = None,
    precision: PrecisionOption = None,
) -> None:
    """Change the generation options that a bundle has by default, and show those that were changed."""
    with exit_on_error():
        found = write_configuration(bundle, parse_assignments(options or (), can_be_empty=True), precision)
        typer.echo(json.dumps(found, indent=2))
