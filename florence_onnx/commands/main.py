"""The command line: `demo`, `run`, `tasks`, `info`, `build-engines` and those of other packages, `serve` and `bench-fal`.

Results go to standard output, everything else (progress, notes, errors) to standard error. Exit codes: 0 all well, 1
some images could not be read, 2 stopped because of the arguments, the model or the disk.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from florence_onnx import __version__
from florence_onnx.commands.build_engines import build_engines
from florence_onnx.commands.configure import configure
from florence_onnx.commands.demo import demo
from florence_onnx.commands.info import info
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
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Florence-2 on ONNX Runtime: captions, boxes, outlines and text of images."""


app.command()(demo)
app.command()(run)
app.command(name="tasks")(list_tasks)
app.command()(info)
app.command()(configure)
app.command(name="build-engines")(build_engines)


_ELSEWHERE: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}
"""Of a command whose options are declared in a package of its own, which is imported when it is asked for."""


@app.command(**_ELSEWHERE)
def serve(context: typer.Context) -> None:
    """Serve fal's API, and a page to try it; needs the extra `serve`."""
    from florence_onnx.commands import serve as command

    raise typer.Exit(command.app(context.args, prog_name=context.command_path, standalone_mode=False) or 0)


@app.command(name="bench-fal", **_ELSEWHERE)
def bench_fal(context: typer.Context) -> None:
    """Compare fal and this package: times, prices and answers; needs the extra `fal`."""
    from florence_onnx.commands import bench_fal as command

    raise typer.Exit(command.app(context.args, prog_name=context.command_path, standalone_mode=False) or 0)
