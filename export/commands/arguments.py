"""Options that the commands share: where the parts of a checkpoint come from."""

from __future__ import annotations

from typing import Annotated

import typer

RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
ProcessorOption = Annotated[
    str | None, typer.Option(help="Tokenizer and preprocessing, for a checkpoint that has none.", metavar="DIR|HUB")
]
AdapterOption = Annotated[
    str | None, typer.Option(help="PEFT adapter to merge into the checkpoint.", metavar="DIR|HUB")
]
BaseOption = Annotated[
    str | None,
    typer.Option(
        help="Base model, where the checkpoint is a PEFT adapter. Default: what its adapter_config.json names.",
        metavar="DIR|HUB",
    ),
]
