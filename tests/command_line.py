"""A command's `main` in this process: exit code and output, without the seconds in which a new process imports torch."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock


def run_here(main: Callable[[], object], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `main` with the arguments of a command line.

    Args:
        main: What the command's entry point calls; reads `sys.argv` and may raise SystemExit.
        *arguments: What follows the command's name.

    Returns:
        What `subprocess.run` returns. An exception that a process would end with is raised.
    """
    command = ["command", *map(str, arguments)]
    output, errors = io.StringIO(), io.StringIO()
    code: object = 0
    with (
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
    assert isinstance(code, int), code
    return subprocess.CompletedProcess(command, code, output.getvalue(), errors.getvalue())
