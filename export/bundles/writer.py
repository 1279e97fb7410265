"""From a checkpoint to a verified bundle directory, all or nothing."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import transformers

import florence_onnx
from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.bundles.memory import ITEMSIZES
from florence_onnx.errors import CheckpointError
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput

from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import write_json
from ..checkpoints.sizes import model_sizes
from ..graphs.plans import OPSET, export_graphs, plans
from ..graphs.top_k import add_top_scores
from ..precisions.recipes import PRECISIONS, VISION_PRECISIONS
from ..verification import checks
from ..verification.activations import check_activations
from ..verification.photograph import PHOTOGRAPH
from .memory import measure
from .weights import gather_weights

Progress = Callable[[str], None]


def _silent(step: str) -> None:
    """No progress."""


@contextmanager
def new_directory(output: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory that appears under its name only when its content is complete.

    Args:
        output: The final place.
        force: Whether an existing export in `output` may be replaced; it is, at the very end. A process that is killed
            between the last two renames leaves it beside, as `.NAME.old-*`.

    Yields:
        A temporary directory beside `output`; it is removed when the block fails.

    Raises:
        CheckpointError: `output` exists and `force` was not given, or it is something else than an export.
    """
    output = output.resolve()
    if output.exists() and not force:
        raise CheckpointError(f"{output} exists; give another directory, or --force to replace it")
    if output.exists() and not _is_replaceable(output):
        raise CheckpointError(f"{output} is not an exported model: --force replaces nothing else; remove it yourself")
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}.incomplete-"))
    try:
        yield staging
        staging.chmod(0o755)
        _replace(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _is_replaceable(path: Path) -> bool:
    """Whether a directory is empty or an export, and not a checkpoint or anything that merely has its name."""
    if not path.is_dir():
        return False
    names = {entry.name for entry in path.iterdir()}
    is_checkpoint = any(name.endswith((".safetensors", ".bin")) for name in names)
    is_single = bundles.DESCRIPTION in names or {"onnx", "config.json"} <= names
    is_several = names <= set(PRECISIONS) and all((path / name / bundles.DESCRIPTION).is_file() for name in names)
    is_export = is_single or is_several
    return not names or (is_export and not is_checkpoint)


def _replace(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
    target.rename(old / target.name)
    try:
        source.rename(target)
    except OSError:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


def export_bundle(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    vision_precision: str | None = None,
    images: Sequence[ImageInput] = (PHOTOGRAPH,),
    force: bool = False,
    progress: Progress = _silent,
) -> Bundle:
    """Exports, verifies and writes a bundle; see `export_bundles`."""
    _check_precisions([precision], vision_precision)
    loaded = [decoding.load(image) for image in images]  # a bad one must not cost the minutes of an export
    with new_directory(Path(output), force=force) as directory:
        graphs, tokens = _write_exact(checkpoint, directory, loaded, progress)
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
    progress: Progress = _silent,
) -> list[Bundle]:
    """Exports once and writes a bundle for each precision, as `output/PRECISION`.

    The fp32 graphs must give the checkpoint's tokens; other precisions are converted from them afterwards, must stay
    within their bounds graph by graph, and how many tokens still agree is measured and noted.

    Args:
        checkpoint: What `load_checkpoint` returned.
        output: The directory to create.
        precisions: Keys of `PRECISIONS`.
        vision_precision: Another precision for the vision encoder of those that are not fp32.
        images: What the verification asks about.
        force: Whether to replace an existing directory.
        progress: Called with what is done next.

    Returns:
        The bundles as they lie on disk.

    Raises:
        CheckpointError: A precision is unknown or the directory exists.
        VerificationError: The graphs do not reproduce the checkpoint; nothing is left behind.
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
            _finish(checkpoint, target, precision, vision_precision, loaded, graphs, tokens, progress)
        shutil.rmtree(exact)
    return [bundles.read(Path(output), precision) for precision in precisions]


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
            "an fp32 bundle is exact in every graph: another precision of the vision encoder goes with "
            f"{', '.join(name for name in PRECISIONS if name != 'fp32')}"
        )


def _write_exact(
    checkpoint: Checkpoint, directory: Path, images: Sequence[ImageInput], progress: Progress
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes and verifies the fp32 graphs; returns the errors of each and the token agreement."""
    progress("running the checkpoint in PyTorch")
    check_activations(checkpoint, images)
    checkpoint.tokenizer.save(str(directory / bundles.TOKENIZER))
    write_json(directory / bundles.GENERATION_CONFIG, checkpoint.generation)
    graphs = _write_graphs(checkpoint, directory, progress)
    progress("comparing answers with transformers")
    return graphs, checks.check_tokens(checkpoint, _unverified(checkpoint, directory, "fp32"), images)


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
    """Turns a directory of verified fp32 graphs into a bundle of another precision."""
    own = precision if precision == "fp32" else vision_precision or precision
    graphs = graphs | _convert_graphs(checkpoint, directory, {bundles.VISION_ENCODER: own}, precision, progress)
    progress("sharing weights")
    gather_weights([directory / plan.name for plan in plans(checkpoint)], directory / bundles.WEIGHTS)
    graphs |= _add_top_scores(checkpoint, directory, precision)
    bundle = _unverified(checkpoint, directory, precision)
    if precision != "fp32":
        progress(f"comparing answers in {precision}")
        tokens = checks.check_tokens(checkpoint, bundle, images)
    description = bundles.describe(
        precision=precision,
        vision_precision=own if own != precision else None,
        sizes=bundle.sizes,
        source=bundle.source,
        verification={"graphs": graphs, "tokens": tokens, "versions": versions()},
        memory=measure(bundle) if {precision, own} <= set(ITEMSIZES) else None,
        files=_files(directory),
    )
    # Written last: without it the directory is no bundle, whatever happened before.
    write_json(directory / bundles.DESCRIPTION, description)


def _write_graphs(checkpoint: Checkpoint, directory: Path, progress: Progress) -> dict[str, Any]:
    reports = export_graphs(checkpoint, directory, progress=lambda name: progress(f"exporting {name}"))
    return {report.path.name: checks.check_graph(report.path.name, report.outputs, "fp32") for report in reports}


def _convert_graphs(
    checkpoint: Checkpoint, directory: Path, precisions: dict[str, str], default: str, progress: Progress
) -> dict[str, Any]:
    """Converts the graphs, each to its own of `precisions` or to the default, and checks each by its own bound."""
    found = {}
    for plan in plans(checkpoint):
        precision = precisions.get(plan.name, default)
        conversion = PRECISIONS[precision].conversion(plan.name)
        if conversion is None:
            continue
        progress(f"converting {plan.name} to {precision}")
        conversion(directory / plan.name)
        found[plan.name] = checks.check_graph(plan.name, checks.compare_graph(plan, directory / plan.name), precision)
    return found


def _add_top_scores(checkpoint: Checkpoint, directory: Path, precision: str) -> dict[str, Any]:
    """Writes the accelerators' decoder beside the other, and checks it by the same module and bound."""
    path = directory / bundles.DECODER_TOP
    add_top_scores(directory / bundles.DECODER, path)
    plan = next(plan for plan in plans(checkpoint) if plan.name == bundles.DECODER)
    return {path.name: checks.check_graph(path.name, checks.compare_graph(plan, path), precision)}


def _unverified(checkpoint: Checkpoint, directory: Path, precision: str) -> Bundle:
    sizes = model_sizes(checkpoint.config, checkpoint.preprocessing)
    generation = bundles.generation_defaults(checkpoint.generation, sizes, directory)
    return Bundle(directory, "florence_onnx", precision, sizes, generation, checkpoint.source)


def versions() -> dict[str, Any]:
    """What an export was made with."""
    return {
        "florence_onnx": florence_onnx.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "onnxruntime": onnxruntime.__version__,
        "opset": OPSET,
    }


def _files(directory: Path) -> dict[str, Any]:
    found = {}
    for path in sorted(directory.iterdir()):
        found[path.name] = {"size": path.stat().st_size, "sha256": bundles.sha256(path)}
    return found
