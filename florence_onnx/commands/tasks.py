"""`florence-onnx tasks`: the table of tasks."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from florence_onnx import tasks
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.bundles.task_presets import PRESETS
from florence_onnx.commands.arguments import MODEL_HELP, PrecisionOption, exit_on_error

_OPTIONS = {"nothing": "", "text": "--text", "region": "--region", "text+region": "--text, --region"}


def list_tasks(
    model: Annotated[str, typer.Option(help=f"{MODEL_HELP} Its own tasks are listed too.")] = DEMO,
    precision: PrecisionOption = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="List what `florence-onnx-export --task` takes, for public fine-tunes.")
    ] = False,
) -> None:
    """List the tasks with their tokens, inputs and prompts."""
    if presets:
        _print(_presets())
        return
    with exit_on_error():
        own = {} if model == DEMO else hub.resolve(model, precision=precision).tasks
    _print(_table([*tasks.TASKS.values(), *own.values()]))


def _table(known: Iterable[tasks.Task[Any]]) -> Table:
    table = _new_table("task", "token", "needs", "prompt")
    for task in known:
        table.add_row(task.slug, task.token, _OPTIONS[task.needs], task.prompt.replace("\n", "\\n"))
    return table


def _presets() -> Table:
    table = _new_table("preset", "tasks", "prompts", "models")
    for name, preset in PRESETS.items():
        slugs, prompts = (task.slug for task in preset.tasks), (task.prompt for task in preset.tasks)
        table.add_row(name, "\n".join(slugs), "\n".join(prompts), "\n".join(preset.models))
    return table


def _new_table(*columns: str) -> Table:
    return Table(*columns, box=None, header_style="bold", pad_edge=False)


def _print(table: Table) -> None:
    # without a terminal, rich wraps rows at 80 columns
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)
