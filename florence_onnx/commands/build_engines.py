"""`florence-onnx build-engines`: builds TensorRT engines for the GPU of this machine."""

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
        int, typer.Option(help="Largest batch of prompts that the engines can decode.", min=1)
    ] = DEFAULT_MAX_BATCH,
) -> None:
    """Build TensorRT engines for the GPU of this machine.

    Takes minutes, and prints the folder of the engines. `--device tensorrt` and `--device auto` use them afterwards.
    """
    from florence_onnx import loading
    from florence_onnx.bundles import hub

    logging.basicConfig(level=logging.WARNING, format="%(message)s")  # progress: each engine takes minutes
    with exit_on_error():
        found = hub.resolve(model, precision=precision, preferred=("fp16", "fp32"))
        engines = loading.build_engines(found, max_batch)
    typer.echo(engines.folder)
