"""The command line `florence-onnx`: puts the commands together.

Results go to standard output; progress, notes and errors go to standard error. Exit codes: 0 success; 1 a part failed
(some images could not be read, some calls have no answer, the default device does not work); 2 nothing was done because
of the arguments, the model or the disk.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from florence_onnx import __version__
from florence_onnx.commands.batch import batch
from florence_onnx.commands.build_engines import build_engines
from florence_onnx.commands.configure import configure
from florence_onnx.commands.demo import demo
from florence_onnx.commands.detect import detect
from florence_onnx.commands.doctor import doctor
from florence_onnx.commands.evaluate import evaluate
from florence_onnx.commands.info import info
from florence_onnx.commands.mcp import mcp
from florence_onnx.commands.pull import pull
from florence_onnx.commands.run import run
from florence_onnx.commands.tasks import list_tasks

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def florence_onnx(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Florence-2 on ONNX Runtime: captioning, detection, segmentation and OCR."""


app.command()(demo)
app.command()(run)
app.command()(detect)
app.command()(batch)
app.command()(evaluate)
app.command(name="tasks")(list_tasks)
app.command()(info)
app.command()(doctor)
app.command()(configure)
app.command(name="build-engines")(build_engines)
app.command()(mcp)
app.command()(pull)


_FORWARDED: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""Settings of a command that passes its arguments on to a module that is imported only when the command is run."""


@app.command(**_FORWARDED)
def serve(context: typer.Context) -> None:
    """Serve fal's API and a web page to try it. Needs the extra `serve`."""
    from florence_onnx.commands import serve as command

    raise typer.Exit(command.app(context.args, prog_name=context.command_path, standalone_mode=False) or 0)


@app.command(name="bench-fal", **_FORWARDED)
def bench_fal(context: typer.Context) -> None:
    """Compare fal and this package: times, prices and answers. Needs the extra `fal`."""
    from florence_onnx.commands import bench_fal as command

    raise typer.Exit(command.app(context.args, prog_name=context.command_path, standalone_mode=False) or 0)
