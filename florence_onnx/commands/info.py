"""`florence-onnx info`: the properties of a model, and the memory that it needs."""

from __future__ import annotations

import json

import typer

from florence_onnx import Florence2
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.arguments import BundleArgument, DeviceOption, PrecisionOption, exit_on_error


def info(
    model: BundleArgument = DEMO,
    precision: PrecisionOption = None,
    device: DeviceOption = "auto",
) -> None:
    """Show a model's properties and memory needs as JSON.

    Sizes, precision, origin, the results of its verification, and the device memory that it needs on a GPU.
    """
    with exit_on_error():
        florence = Florence2.from_pretrained(model, device=device, precision=precision)
        typer.echo(json.dumps(florence.info(), indent=2, ensure_ascii=False))
