"""The layout of `onnx-community/Florence-2-*`: four graphs and the configs that transformers.js reads.

| graph | in | out |
|---|---|---|
| `vision_encoder` | `pixel_values` | `image_features` |
| `embed_tokens` | `input_ids` | `inputs_embeds` |
| `encoder_model` | `attention_mask`, `inputs_embeds` | `last_hidden_state` |
| `decoder_model_merged` | encoder mask and states, `inputs_embeds`, `past_key_values.*`, `use_cache_branch` | `logits`,
`present.*` |

The merged decoder is an `If` of two graphs that share their weights, made by optimum. When it is called with a cache,
its `present.*.encoder.*` are empty, and the caller keeps those of the first step. The batch axis of `past_key_values.*`
must be named `batch_size`: transformers.js looks for that name, and otherwise creates a cache with 0 rows without an
error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from optimum.onnx import merge_decoders
from torch import Tensor

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import precisions
from florence_onnx.errors import CheckpointError
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput
from florence_onnx.tasks import Task

from ..bundles.directories import new_directory
from ..bundles.writer import NO_TASKS, versions, write_tasks
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import write_json
from ..graphs.comparison import OutputError, compare, resized
from ..graphs.exporter import export_graph
from ..graphs.files import save, tidy
from ..graphs.plans import OPSET, GraphPlan
from ..precisions.fp16 import FP16_MAX
from ..verification import checks
from ..verification.activations import check_activations
from ..verification.photograph import PHOTOGRAPH
from .configs import write_files
from .plans import FIRST, MERGED, NEXT, plans

Progress = Callable[[str], None]


def export_transformers_js(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    images: Sequence[ImageInput] = (PHOTOGRAPH,),
    force: bool = False,
    tasks: Mapping[str, Task[Any]] = NO_TASKS,
    progress: Progress = lambda step: None,
) -> bundles.Bundle:
    """Exports, verifies and writes the layout of transformers.js.

    Args:
        checkpoint: What `load_checkpoint` returned.
        output: The directory to create.
        precision: `fp32` or `fp16`. In fp16 the files end in `_fp16`, and their inputs and outputs stay fp32.
        images: The images to verify on, see `checks.check_tokens`.
        force: Whether to replace an existing export.
        tasks: Tasks that the bundle carries beside Florence-2's, by slug.
        progress: Called with a line of text before each step.

    Returns:
        The bundle on disk; its `verification` has the errors of each file and the token agreement of each search.

    Raises:
        CheckpointError: The precision is unknown, the directory exists, or the checkpoint itself overflows.
        VerificationError: A graph does not reproduce the checkpoint. Nothing is written.
    """
    if precision not in ("fp32", "fp16"):
        raise CheckpointError(f"the transformers.js layout is written in fp32 or fp16, not {precision!r}")
    width, height = checkpoint.preprocessing.image_size
    if checkpoint.other_image_sizes or width != height:
        raise CheckpointError("the transformers.js layout has one image size, a square: give one --image-size SIDE")
    loaded = [decoding.load(image) for image in images]
    with new_directory(Path(output), force=force) as directory:
        progress("running the checkpoint in PyTorch")
        check_activations(checkpoint, loaded)
        graphs = _write_graphs(checkpoint, directory / "onnx", precision, progress)
        write_files(checkpoint, directory)
        write_tasks(directory, tasks)
        progress("comparing answers with transformers")
        tokens = checks.check_tokens(checkpoint, bundles.read(directory, precision), loaded)
        verification = {"graphs": graphs, "tokens": tokens, "versions": versions()}
        measured = {"source": checkpoint.source, "verification": verification}
        write_json(directory / bundles.JS_VERIFICATION, measured)
    return bundles.read(Path(output), precision)


def _write_graphs(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> dict[str, Any]:
    suffix = precisions.JS_SUFFIXES[precision]
    found: dict[str, Any] = {}
    decoders: list[GraphPlan] = []
    for plan in plans(checkpoint):
        progress(f"exporting {plan.name}")
        path = folder / f"{plan.name}{suffix}.onnx"
        report = export_graph(
            plan.module, path, inputs=plan.inputs, outputs=plan.outputs, dynamic_axes=plan.dynamic_axes, opset=OPSET
        )
        errors = report.outputs
        if precision == "fp16":
            _to_fp16(path)
            errors = compare(plan.module, path, resized(plan.inputs, plan.dynamic_axes), plan.outputs)
        summary = checks.check_graph(path.name, errors, precision)
        if plan.name in (FIRST, NEXT):
            decoders.append(plan)
        else:
            found[path.name] = summary
    progress(f"merging {MERGED}")
    merged = folder / f"{MERGED}{suffix}.onnx"
    first, following = decoders
    _merge(folder / f"{FIRST}{suffix}.onnx", folder / f"{NEXT}{suffix}.onnx", merged)
    found[merged.name] = checks.check_graph(merged.name, _merged_errors(merged, first, following), precision)
    return found


def _to_fp16(path: Path) -> None:
    """Converts a graph's weights and arithmetic to fp16, in place; inputs and outputs stay fp32.

    The two decoders are converted before they are merged. Converting the merged graph would put the casts of its
    outputs outside the `If`, and let a branch return a value of the outer graph, which ONNX Runtime rejects.
    LayerNormalization stays in fp32, because ONNX Runtime's `SimplifiedLayerNormFusion` fails on the casts around an
    fp16 one.
    """
    converted = convert_float_to_float16(
        onnx.load(str(path)), keep_io_types=True, op_block_list=["LayerNormalization"], max_finite_val=FP16_MAX
    )
    # The converter appends its casts at the end, but the nodes of an `If` branch must be in topological order.
    OnnxModel.graph_topological_sort(converted.graph)
    save(converted, path)
    tidy(path)


def _merge(first: Path, following: Path, merged: Path) -> None:
    merge_decoders(first, following, save_path=merged, strict=False)
    tidy(merged)
    for path in (first, following):
        path.unlink()
        path.with_name(path.name + "_data").unlink(missing_ok=True)


def _merged_errors(path: Path, first: GraphPlan, following: GraphPlan) -> dict[str, OutputError]:
    """Returns the errors of both branches.

    The merged graph has the inputs of both. Those that a branch does not read are fed as a caller feeds them: an empty
    cache at the first step, and the encoder's hidden states after it.
    """
    branches = []
    for plan, other, flag in ((first, following, False), (following, first, True)):
        inputs = resized(plan.inputs, plan.dynamic_axes)
        unread = {
            name: tensor for name, tensor in resized(other.inputs, other.dynamic_axes).items() if name not in inputs
        }
        if not flag:
            unread = {name: tensor[:, :, :0] for name, tensor in unread.items()}
        feeds = {**inputs, **unread, "use_cache_branch": torch.tensor([flag])}

        def reference(*tensors: Tensor, plan: GraphPlan = plan, count: int = len(inputs)) -> Any:
            return plan.module(*tensors[:count])

        branches.append(compare(reference, path, feeds, plan.outputs))
    return {
        f"{name} ({when} cache)": error
        for when, errors in zip(("without", "with"), branches, strict=True)
        for name, error in errors.items()
    }
