"""`florence-onnx tasks`: the table of tasks."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

from florence_onnx import tasks


def list_tasks() -> None:
    """List the tasks with their tokens, inputs and prompts."""
    table = Table("task", "token", "needs", "prompt", box=None, header_style="bold", pad_edge=False)
    for task in tasks.TASKS.values():
        needs = {"nothing": "", "text": "--text", "region": "--region"}[task.needs]
        table.add_row(task.slug, task.token, needs, task.prompt)
    # without a terminal, rich wraps rows at 80 columns
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(table)
