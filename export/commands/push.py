"""`florence-onnx-export push OUT owner/name`: publishes verified bundles with a model card.

Exit codes: 0 it is published, 2 it was refused or did not finish, 130 it was interrupted. In the latter two nothing is
published.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from florence_onnx.errors import FlorenceError

from ..publishing.push import AGAIN, Pushed
from ..publishing.push import push as push_bundles

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.callback()
def florence_onnx_export() -> None:
    """Publishes exported bundles; `florence-onnx-export CHECKPOINT OUT` exports one."""


@app.command()
def push(
    output: Annotated[Path, typer.Argument(help="What an export has written.", metavar="OUT")],
    repository: Annotated[str, typer.Argument(help="Hub repository, created if needed.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to, created if needed.")] = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Push what was not verified too; the model card says so.")
    ] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Delete files of other bundles that are in the repository.")
    ] = False,
    license: Annotated[
        str | None, typer.Option(help="Licence, such as mit. Default: the checkpoint's own.", metavar="NAME")
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the checkpoint. Default: what the export recorded.", metavar="HUB")
    ] = None,
) -> None:
    """Publishes bundles on the model hub, with a model card made from their verification, in one commit.

    The token is that of `hf auth login` or of HF_TOKEN. `florence-onnx pull` downloads what was pushed.
    """
    try:
        pushed = push_bundles(
            output,
            repository,
            private=private,
            revision=revision,
            unverified=unverified,
            replace=replace,
            license=license,
            base_model=base_model,
        )
    except FlorenceError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"\ninterrupted: {AGAIN}", err=True)
        raise typer.Exit(130) from None
    _report(pushed, revision)


def _report(pushed: Pushed, revision: str | None) -> None:
    if pushed.left_out:
        typer.echo(f"not pushed, because they belong to no bundle: {', '.join(pushed.left_out)}", err=True)
    typer.echo(
        f"{pushed.repository}: {len(pushed.files)} files, {pushed.num_bytes / 1e6:.1f} MB, commit {pushed.commit}"
    )
    at = f" --revision {revision}" if revision else ""
    typer.echo(f"florence-onnx pull {pushed.repository} DIR{at}")


def main() -> None:
    """Runs the command line, whose first argument is `push`."""
    app()
