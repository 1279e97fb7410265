"""`florence-onnx pull`: downloads a bundle from the hub and checks it. It needs no PyTorch, so it belongs to this command;
`florence-onnx-export pull` is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from florence_onnx.bundles.pulling import Pulled
from florence_onnx.bundles.pulling import pull as pull_bundles
from florence_onnx.commands.arguments import exit_on_error

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def florence_onnx_export() -> None:
    """Downloads exported bundles; `florence-onnx-export CHECKPOINT OUT` exports one."""


@app.command()
def pull(
    repository: Annotated[str, typer.Argument(help="Hub repository (owner/name).")],
    folder: Annotated[
        Path | None,
        typer.Argument(help="Where to put it. Default: the hub client's cache.", metavar="[DIR]", show_default=False),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Which of several bundles. Default: all of them.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Download again what is there already.")] = False,
) -> None:
    """Download a bundle from the hub, compare every file with its recorded hash, and say how to load it.

    After an interruption the same command goes on where it stopped.
    """
    with exit_on_error():
        found = pull_bundles(repository, folder, precision=precision, revision=revision, force=force)
    typer.echo(_report(found))
    # from the cache it is loaded by its name, which names the revision too
    name = repository if folder is None else str(folder)
    more = f', revision="{revision}"' if revision and folder is None else ""
    typer.echo(f'Python:  Florence2.from_pretrained("{name}"{more})')
    typer.echo(f"command: florence-onnx run caption IMAGE --model {found.folder if more else name}")


def _report(found: Pulled) -> str:
    precisions = ", ".join(bundle.precision for bundle in found.bundles)
    hashes = f"{found.num_hashed} files as recorded" if found.num_hashed else "this layout records no hashes"
    return f"{found.folder}: {precisions}, {found.num_bytes / 1e6:.1f} MB; {hashes}"


def main() -> None:
    """Runs the command line, whose first argument is `pull`."""
    app()
