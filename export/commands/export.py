"""`python -m export CHECKPOINT OUT`, installed as `florence-onnx-export`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from florence_onnx.bundles.bundle import Bundle, parse_image_size
from florence_onnx.bundles.own_tasks import gather
from florence_onnx.bundles.task_presets import PRESETS
from florence_onnx.errors import CheckpointError, FlorenceError
from florence_onnx.runtime.tensorrt import DEFAULT_MAX_BATCH

from ..bundles.tensorrt import build_engines, check_tensorrt
from ..bundles.writer import export_bundle, export_bundles
from ..checkpoints.checkpoint import load_checkpoint
from ..precisions.recipes import PRECISIONS, VISION_PRECISIONS
from ..transformers_js.writer import export_transformers_js
from ..verification.photograph import PHOTOGRAPH
from .arguments import AdapterOption, BaseOption, ProcessorOption, RevisionOption

_console = Console(stderr=True)


class Layout(str, Enum):
    """The directory layouts that can be written."""

    BUNDLE = "florence_onnx"
    TRANSFORMERS_JS = "transformers.js"


def export(
    checkpoint: Annotated[str, typer.Argument(help="Folder or hub id of a Florence-2 checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory to create.")],
    precision: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Precision of weights and activations: {', '.join(PRECISIONS)}. Default: fp32. "
            "May be repeated: each then gets a directory in OUTPUT."
        ),
    ] = None,
    vision_precision: Annotated[
        str | None,
        typer.Option(help=f"Another precision for the vision encoder: {', '.join(VISION_PRECISIONS)}."),
    ] = None,
    layout: Annotated[
        Layout, typer.Option(help="Three graphs for this package, or four as in onnx-community/Florence-2-*.")
    ] = Layout.BUNDLE,
    revision: RevisionOption = None,
    image_size: Annotated[
        list[str] | None,
        typer.Option(
            help="Pixels at which the model reads images: the side of a square, or WIDTHxHEIGHT. May be repeated: the bundle "
            "then has a vision encoder for each, the first is the default. Default: the checkpoint's own size.",
            metavar="SIZE",
        ),
    ] = None,
    processor: ProcessorOption = None,
    adapter: AdapterOption = None,
    base: BaseOption = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="Task that the model has beside Florence-2's: a preset "
            f"({', '.join(PRESETS)}) or a JSON file. May be repeated.",
            metavar="PRESET|FILE",
        ),
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="Image to verify on; may be repeated. Default: a built-in photograph."),
    ] = None,
    tensorrt: Annotated[
        bool, typer.Option("--tensorrt", help="Also build TensorRT engines for this machine's GPU.")
    ] = False,
    max_batch: Annotated[
        int, typer.Option(help="Most prompts that the engines take together.", min=1)
    ] = DEFAULT_MAX_BATCH,
    force: Annotated[bool, typer.Option("--force", help="Replace the directory if it exists.")] = False,
) -> None:
    """Exports a Florence-2 checkpoint to ONNX, and verifies that it gives the same answers.

    Exits with 1 and writes nothing if the graphs do not reproduce the checkpoint.

    Other commands, as the first argument: `verify` measures how much bundles agree with fp32, `doctor` examines a
    checkpoint before an export, `check` tries published checkpoints, `push` and `pull` publish and download bundles. Each
    has its own --help.
    """
    try:
        tasks = gather(task or ())  # before the export, which takes minutes
        if tensorrt:
            check_tensorrt(precision or ["fp32"], layout is Layout.BUNDLE, max_batch)
        with _console.status(f"loading {checkpoint}") as status:
            loaded = load_checkpoint(checkpoint, revision=revision, processor=processor, adapter=adapter, base=base)
            if image_size:
                loaded = loaded.resized([parse_image_size(each) for each in image_size])
            for note in loaded.notes:
                _console.log(f"note: {note}", markup=False)

            def progress(step: str) -> None:
                _console.log(step)
                status.update(step)

            images = image or [PHOTOGRAPH]
            precisions = precision or ["fp32"]
            common: dict[str, Any] = {"images": images, "force": force, "tasks": tasks, "progress": progress}
            written: list[Bundle]
            if layout is Layout.TRANSFORMERS_JS:
                _check_single(precisions, vision_precision)
                written = [export_transformers_js(loaded, output, precision=precisions[0], **common)]
            elif len(precisions) == 1:
                common["vision_precision"] = vision_precision
                written = [export_bundle(loaded, output, precision=precisions[0], **common)]
            else:
                common["vision_precision"] = vision_precision
                written = export_bundles(loaded, output, precisions=precisions, **common)
            engines = [build_engines(bundle, max_batch, progress) for bundle in written] if tensorrt else []
    except (FlorenceError, OSError) as error:
        typer.echo(f"error: {error}", err=True)  # not with rich, which would read [cpu] as markup
        raise typer.Exit(1) from error
    for bundle in written:
        _console.print(_report(bundle))
    for each in engines:
        _console.print(f"TensorRT engines: {each.folder}", markup=False)
    typer.echo(output)


def _check_single(precisions: list[str], vision_precision: str | None) -> None:
    if len(precisions) > 1 or vision_precision is not None:
        raise CheckpointError("the transformers.js layout is written in one precision, the same for every graph")


def _report(bundle: Bundle) -> Table:
    table = Table(title=f"{bundle.path.name}, {bundle.precision}: verified against transformers")
    for column in ("what", "max abs error", "max relative error", "tokens equal"):
        table.add_column(column)
    for name, error in bundle.verification["graphs"].items():
        table.add_row(name, f"{error['max_abs']:.2e}", f"{error['max_rel']:.2e}", "")
    for name, tokens in bundle.verification["tokens"].items():
        table.add_row(name, "", "", f"{tokens['equal']} of {tokens['total']}")
    return table


def main() -> None:
    """Runs the command line."""
    typer.run(export)
