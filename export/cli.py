"""`python -m export CHECKPOINT OUT`, installed as `florence-onnx-export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from florence_onnx.bundle import Bundle
from florence_onnx.errors import FlorenceError

from .checkpoint import load_checkpoint
from .optimize import CONVERSIONS
from .photograph import PHOTOGRAPH
from .transformers_js import export_transformers_js
from .write_bundle import export_bundle

_console = Console(stderr=True)


class Layout(str, Enum):
    """Directory layouts that can be written."""

    BUNDLE = "florence_onnx"
    TRANSFORMERS_JS = "transformers.js"


def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a Florence-2 checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to create.")],
    precision: Annotated[
        str, typer.Option(help=f"Of weights and activations: fp32, {', '.join(CONVERSIONS)}.")
    ] = "fp32",
    layout: Annotated[
        Layout, typer.Option(help="This project's three graphs, or the four of onnx-community/Florence-2-*.")
    ] = Layout.BUNDLE,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Picture to verify on; may be repeated. Default: a photograph that comes along."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
) -> None:
    """Turns a Florence-2 checkpoint into ONNX, and proves that it answers as before.

    Exits with 1, leaving nothing behind, when the graphs do not reproduce the checkpoint.

    With `verify` as the first argument, measures instead how much bundles agree with fp32: see `verify --help`.
    """
    try:
        with _console.status(f"loading {checkpoint}") as status:
            loaded = load_checkpoint(checkpoint, revision=revision)

            def progress(step: str) -> None:
                _console.log(step)
                status.update(step)

            write = export_transformers_js if layout is Layout.TRANSFORMERS_JS else export_bundle
            pictures = image or [PHOTOGRAPH]
            bundle = write(loaded, output, precision=precision, pictures=pictures, force=force, progress=progress)
    except (FlorenceError, OSError) as error:
        typer.echo(f"error: {error}", err=True)  # not through rich, which would take [cpu] for markup
        raise typer.Exit(1) from error
    _console.print(_report(bundle))
    typer.echo(output)


def _report(bundle: Bundle) -> Table:
    table = Table(title=f"{bundle.path.name}, {bundle.precision}: verified against transformers")
    for column in ("what", "max abs error", "max relative error", "tokens equal"):
        table.add_column(column)
    for name, error in bundle.verification["graphs"].items():
        table.add_row(name, f"{error['max_abs']:.2e}", f"{error['max_rel']:.2e}", "")
    for name, tokens in bundle.verification["tokens"].items():
        table.add_row(name, "", "", f"{tokens['equal']} of {tokens['total']}")
    return table


def main() -> None:
    """Runs the command line."""
    typer.run(export)
