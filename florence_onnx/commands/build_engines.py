"""`florence-onnx build-engines`: TensorRT engines for the card of this machine."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import BundleArgument, PrecisionOption, exit_on_error
from florence_onnx.runtime.tensorrt import DEFAULT_MAX_BATCH


def build_engines(
    model: BundleArgument = DEMO,
    precision: PrecisionOption = None,
    max_batch: Annotated[
        int, typer.Option(help="Most prompts that the engines take together.", min=1)
    ] = DEFAULT_MAX_BATCH,
) -> None:
    """Build the TensorRT engines of a bundle for the card of this machine, for `--device tensorrt` and `auto`."""
    from florence_onnx import loading
    from florence_onnx.bundles import hub

    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # what is being built: it takes minutes
    with exit_on_error():
        found = hub.resolve(model, precision=precision, preferred=("fp16", "fp32"))
        engines = loading.build_engines(found, max_batch)
    typer.echo(engines.folder)
