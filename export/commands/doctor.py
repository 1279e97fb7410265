"""`florence-onnx-export doctor CHECKPOINT`: all that is peculiar about a checkpoint, before minutes of export.

Exit codes: 0 it can be exported, 1 something is refused.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..checkpoints.diagnosis import Diagnosis, diagnose
from .arguments import AdapterOption, BaseOption, ProcessorOption, RevisionOption

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def florence_onnx_export() -> None:
    """Examines a checkpoint; `florence-onnx-export CHECKPOINT OUT` exports it."""


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a Florence-2 checkpoint, or of an adapter.")],
    revision: RevisionOption = None,
    processor: ProcessorOption = None,
    adapter: AdapterOption = None,
    base: BaseOption = None,
    is_json: Annotated[bool, typer.Option("--json", help="Write JSON to standard output instead of a table.")] = False,
) -> None:
    """Says in one table what a checkpoint is, what is unusual about it and what would be refused, without exporting it.

    A hub id is downloaded first. Exits with 1 if an export would be refused.
    """
    found = diagnose(checkpoint, revision=revision, processor=processor, adapter=adapter, base=base)
    if is_json:
        typer.echo(json.dumps({"checkpoint": checkpoint, **found.to_dict()}, indent=2, ensure_ascii=False))
    else:
        _print_table(checkpoint, found)
    if not found.can_be_exported:
        raise typer.Exit(1)


def _print_table(checkpoint: str, found: Diagnosis) -> None:
    # when piped, rich would fold the rows at 80 columns
    width = None if sys.stdout.isatty() else 160
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    verdict = "can be exported" if found.can_be_exported else "cannot be exported as it is"
    table = Table(title=f"{Path(checkpoint).name}: {verdict}")
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for each in found.findings:
        table.add_row("" if each.verdict == "ok" else each.verdict, each.topic, each.text)
    console.print(table)


def main() -> None:
    """Runs the command line, whose first argument is `doctor`."""
    app()
