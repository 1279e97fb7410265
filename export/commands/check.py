"""`florence-onnx-export check [MODEL…]`: published checkpoints against transformers and against published answers.

Exit codes: 0 all agrees, 1 something disagrees, 2 something could not be tried or settled.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from florence_onnx.errors import FlorenceError

from ..bundles.writer import versions
from ..published.answers import PUBLISHED_ANSWERS, read_published
from ..published.check import Settings, check, targets
from ..published.rows import Row, exit_code, make_table, to_dict, unknown_images

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
WORK = Path("florence-onnx-check")


@app.callback()
def florence_onnx_export() -> None:
    """Checks published checkpoints; `florence-onnx-export CHECKPOINT OUT` exports one."""


@app.command(name="check")
def check_command(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Hub ids, with @REVISION if needed. Default: all with published answers.", metavar="[MODEL]…"
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder with images under their published names, for dead addresses.", metavar="DIR"),
    ] = None,
    answers: Annotated[
        Path, typer.Option(help="Published answers. Default: those that come with the package.", show_default=False)
    ] = PUBLISHED_ANSWERS,
    work: Annotated[
        Path, typer.Option(help="Folder for exports, images and what is done so far.", metavar="DIR")
    ] = WORK,
    keep: Annotated[bool, typer.Option("--keep", help="Keep downloads and exports.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output instead of a table.")] = False,
) -> None:
    """Downloads published checkpoints, exports them, and compares their answers with transformers' and with published ones.

    The size of each download is said before it. A checkpoint that fails is a row and does not stop the others; after an
    interruption the same command goes on where it stopped. Downloads and exports are removed afterwards, except what was
    in the hub client's cache before. Exits with 1 if anything disagrees, with 2 if something could not be tried.
    """
    try:
        published = read_published(answers)
        wanted = targets(published, model or ())
        settings = Settings(work, images, keep, lambda line: typer.echo(line, err=True))
        rows = list(check(published, wanted, settings))
    except FlorenceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted: the same command goes on where it stopped; {work} has what is done", err=True)
        raise typer.Exit(130) from None
    _write(rows, is_json=is_json)
    raise typer.Exit(exit_code(rows))


def _write(rows: Sequence[Row], *, is_json: bool) -> None:
    if is_json:
        typer.echo(json.dumps(to_dict(rows, versions()), indent=2, ensure_ascii=False))
        return
    # when piped, rich would fold the rows at 80 columns
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, emoji=False, highlight=False)
    console.print(make_table(rows))
    typer.echo(", ".join(f"{name} {version}" for name, version in versions().items()))
    for name, digest in unknown_images(rows).items():
        typer.echo(f"{name}: SHA-256 {digest}, not known before")


def main() -> None:
    """Runs the command line, whose first argument is `check`."""
    app()
