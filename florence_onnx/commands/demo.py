"""`florence-onnx demo`: object detection with the built-in model, which needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from florence_onnx import Florence2, tasks
from florence_onnx.bundles.bundle import DEMO
from florence_onnx.commands.annotated_images import save
from florence_onnx.commands.arguments import DEMO_NOTE, DeviceOption, exit_on_error

SAMPLES = Path(__file__).parents[1] / "demo" / "samples"


def demo(
    output: Annotated[Path, typer.Option(help="File for the annotated image.")] = Path("florence-onnx-demo.png"),
    device: DeviceOption = "auto",
) -> None:
    """Detect shapes in a sample image with the demo model."""
    sample = SAMPLES / json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]["file"]
    with exit_on_error():
        model = Florence2.from_pretrained(DEMO, device=device)
        prediction = model.run(tasks.OBJECT_DETECTION, sample)
        save(prediction, output)
    typer.echo(json.dumps(prediction.to_dict(), indent=2, ensure_ascii=False))
    typer.echo(f"{sample.name}: annotated image written to {output}", err=True)
    typer.echo(DEMO_NOTE, err=True)
