"""Writing verified bundles of a checkpoint: completely, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

import florence_onnx
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import own_tasks
from florence_onnx.bundles.bundle import Bundle, SizedEncoder
from florence_onnx.bundles.description import sealed
from florence_onnx.bundles.memory import ITEMSIZES
from florence_onnx.errors import CheckpointError
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput
from florence_onnx.tasks import Task

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import write_json
from ..checkpoints.preprocessing import count_image_tokens
from ..checkpoints.sizes import model_sizes
from ..graphs.plans import OPSET, export_graphs, plans
from ..graphs.top_k import add_top_k
from ..precisions.recipes import PRECISIONS, VISION_PRECISIONS
from ..verification import checks
from ..verification.activations import check_activations
from ..verification.photograph import PHOTOGRAPH
from .directories import new_directory
from .memory import measure
from .weights import gather_weights

Progress = Callable[[str], None]
NO_TASKS: Mapping[str, Task[Any]] = {}


def _silent(step: str) -> None:
    """Reports no progress."""


def export_bundle(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    vision_precision: str | None = None,
    images: Sequence[ImageInput] = (PHOTOGRAPH,),
    force: bool = False,
    tasks: Mapping[str, Task[Any]] = NO_TASKS,
    progress: Progress = _silent,
) -> Bundle:
    """Exports, verifies and writes one bundle, as `output` itself. Other arguments are as for `export_bundles`."""
    _check_precisions([precision], vision_precision)
    loaded = [decoding.load(image) for image in images]  # before the export, which takes minutes
    with new_directory(Path(output), force=force) as directory:
        graphs, tokens = _write_exact(checkpoint, directory, loaded, progress)
        write_tasks(directory, tasks)
        _finish(checkpoint, directory, precision, vision_precision, loaded, graphs, tokens, progress)
    return bundles.read(Path(output))


def export_bundles(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    precisions: Sequence[str],
    vision_precision: str | None = None,
    images: Sequence[ImageInput] = (PHOTOGRAPH,),
    force: bool = False,
    tasks: Mapping[str, Task[Any]] = NO_TASKS,
    progress: Progress = _silent,
) -> list[Bundle]:
    """Exports once and writes a bundle for each precision, as `output/PRECISION`.

    The fp32 graphs must reproduce the checkpoint's tokens exactly. Graphs of other precisions are converted from them
    and must stay within the bounds of their precision; the share of equal tokens is measured and written into the
    bundle.

    Args:
        checkpoint: What `load_checkpoint` returned.
        output: The directory to create.
        precisions: Keys of `PRECISIONS`.
        vision_precision: Another precision for the vision encoder; not for fp32 bundles.
        images: The images to verify on.
        force: Whether to replace an existing export.
        tasks: Tasks that the bundles carry beside Florence-2's, by slug.
        progress: Called with a line of text before each step.

    Returns:
        The bundles on disk.

    Raises:
        CheckpointError: A precision is unknown, or the directory exists.
        VerificationError: A graph does not reproduce the checkpoint. Nothing is written.
    """
    _check_precisions(precisions, vision_precision)
    loaded = [decoding.load(image) for image in images]
    precisions = list(dict.fromkeys(precisions))
    with new_directory(Path(output), force=force) as directory:
        exact = directory / ".exact"
        exact.mkdir()
        graphs, tokens = _write_exact(checkpoint, exact, loaded, progress)
        for precision in precisions:
            target = Path(shutil.copytree(exact, directory / precision))
            write_tasks(target, tasks)
            _finish(checkpoint, target, precision, vision_precision, loaded, graphs, tokens, progress)
        shutil.rmtree(exact)
    return [bundles.read(Path(output), precision) for precision in precisions]


def write_tasks(directory: Path, tasks: Mapping[str, Task[Any]]) -> None:
    """Writes the file of a bundle's own tasks, where there are any.

    Raises:
        InputError: A task cannot be written, or has the name of another one.
    """
    if tasks:
        content = own_tasks.to_json(own_tasks.collect(list(tasks.values())))
        own_tasks.parse(content)
        write_json(directory / own_tasks.TASKS_FILE, content)


def _check_precisions(precisions: Sequence[str], vision_precision: str | None) -> None:
    for precision in precisions:
        if precision not in PRECISIONS:
            raise CheckpointError(f"unknown precision {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if vision_precision is not None and vision_precision not in VISION_PRECISIONS:
        raise CheckpointError(
            f"unknown precision {vision_precision!r} of the vision encoder; choose one of {', '.join(VISION_PRECISIONS)}"
        )
    if vision_precision is not None and set(precisions) == {"fp32"}:
        raise CheckpointError(
            "an fp32 bundle is exact in every graph; another precision of the vision encoder can be combined with "
            f"{', '.join(name for name in PRECISIONS if name != 'fp32')}"
        )


def _write_exact(
    checkpoint: Checkpoint, directory: Path, images: Sequence[ImageInput], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes and verifies the fp32 graphs; returns the errors of each graph and the token agreement of each search."""
    progress("running the checkpoint in PyTorch")
    check_activations(checkpoint, images)
    checkpoint.tokenizer.save(str(directory / bundles.TOKENIZER))
    write_json(directory / bundles.GENERATION_CONFIG, checkpoint.generation)
    graphs = _write_graphs(checkpoint, directory, progress)
    progress("comparing answers with transformers")
    return graphs, _check_tokens(checkpoint, directory, "fp32", images)


def _check_tokens(
    checkpoint: Checkpoint, directory: Path, precision: str, images: Sequence[ImageInput]
) -> dict[str, Any]:
    """Token agreement by the name of the search; with several image sizes those beside the default are named behind it."""
    bundle = _unverified(checkpoint, directory, precision)
    found = checks.check_tokens(checkpoint, bundle, images)
    for size in checkpoint.other_image_sizes:
        other = checks.check_tokens(checkpoint.resized([size]), bundle.resized(size), images)
        found |= {f"{search}, {bundles.size_name(size)}": tokens for search, tokens in other.items()}
    return found


def _finish(
    checkpoint: Checkpoint,
    directory: Path,
    precision: str,
    vision_precision: str | None,
    images: Sequence[ImageInput],
    graphs: dict[str, Any],
    tokens: dict[str, Any],
    progress: Progress,
) -> None:
    """Turns a directory of verified fp32 graphs into a bundle of the given precision."""
    own = precision if precision == "fp32" else vision_precision or precision
    graphs = graphs | _convert_graphs(checkpoint, directory, own, precision, progress)
    progress("sharing weights")
    gather_weights([directory / plan.name for plan in plans(checkpoint)], directory / bundles.WEIGHTS)
    graphs |= _add_top_k(checkpoint, directory, precision)
    bundle = _unverified(checkpoint, directory, precision)
    if precision != "fp32":
        progress(f"comparing answers in {precision}")
        tokens = _check_tokens(checkpoint, directory, precision, images)
    has_memory = {precision, own} <= set(ITEMSIZES)
    description = bundles.describe(
        precision=precision,
        vision_precision=own if own != precision else None,
        sizes=bundle.sizes,
        source=bundle.source,
        verification={"graphs": graphs, "tokens": tokens, "versions": versions()},
        memory=measure(bundle) if has_memory else None,
        files=_files(directory),
        encoders=[
            replace(each, memory=measure(bundle.resized(each.image_size)) if has_memory else {})
            for each in bundle.encoders
        ],
    )
    # Written last: without it the directory is not a bundle, wherever the process is killed.
    write_json(directory / bundles.DESCRIPTION, sealed(description))


def _write_graphs(checkpoint: Checkpoint, directory: Path, progress: Progress) -> dict[str, Any]:
    reports = export_graphs(checkpoint, directory, progress=lambda name: progress(f"exporting {name}"))
    return {report.path.name: checks.check_graph(report.path.name, report.outputs, "fp32") for report in reports}


def _convert_graphs(
    checkpoint: Checkpoint, directory: Path, vision: str, default: str, progress: Progress
) -> dict[str, Any]:
    """Converts the vision encoders to `vision` and the other graphs to `default`, and checks each by that bound."""
    found = {}
    for plan in plans(checkpoint):
        precision = vision if bundles.is_vision_encoder(plan.name) else default
        conversion = PRECISIONS[precision].conversion(plan.name)
        if conversion is None:
            continue
        progress(f"converting {plan.name} to {precision}")
        conversion(directory / plan.name)
        found[plan.name] = checks.check_graph(plan.name, checks.compare_graph(plan, directory / plan.name), precision)
    return found


def _add_top_k(checkpoint: Checkpoint, directory: Path, precision: str) -> dict[str, Any]:
    """Writes the decoder with top-k outputs beside the plain one, and checks it against the same module and bound."""
    path = directory / bundles.DECODER_TOP
    add_top_k(directory / bundles.DECODER, path)
    plan = next(plan for plan in plans(checkpoint) if plan.name == bundles.DECODER)
    return {path.name: checks.check_graph(path.name, checks.compare_graph(plan, path), precision)}


def _unverified(checkpoint: Checkpoint, directory: Path, precision: str) -> Bundle:
    sizes = model_sizes(checkpoint.config, checkpoint.preprocessing)
    generation = bundles.generation_defaults(checkpoint.generation, sizes, directory)
    sizes_of_all = [checkpoint.preprocessing.image_size, *checkpoint.other_image_sizes]
    return Bundle(
        directory,
        "florence_onnx",
        precision,
        sizes,
        generation,
        checkpoint.source,
        encoders=_encoders(checkpoint, sizes_of_all) if len(sizes_of_all) > 1 else (),
    )


def _encoders(checkpoint: Checkpoint, image_sizes: Sequence[tuple[int, int]]) -> tuple[SizedEncoder, ...]:
    names = [bundles.VISION_ENCODER, *map(bundles.vision_encoder_name, image_sizes[1:])]
    counts = [count_image_tokens(checkpoint.config, size) for size in image_sizes]
    return tuple(SizedEncoder(*each) for each in zip(image_sizes, counts, names, strict=True))


def versions() -> dict[str, Any]:
    """Returns the versions of the libraries that made the export, and the operator set."""
    return {
        "florence_onnx": florence_onnx.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "opset": OPSET,
    }


def _files(directory: Path) -> dict[str, Any]:
    found = {}
    # without the hash of its tasks, which may be changed by hand
    for path in (each for each in sorted(directory.iterdir()) if each.name != own_tasks.TASKS_FILE):
        found[path.name] = {"size": path.stat().st_size, "sha256": bundles.sha256(path)}
    return found
