"""The layout of `onnx-community/Florence-2-*`: four graphs and the configs that transformers.js reads.

| graph | in | out |
|---|---|---|
| `vision_encoder` | `pixel_values` | `image_features` |
| `embed_tokens` | `input_ids` | `inputs_embeds` |
| `encoder_model` | `attention_mask`, `inputs_embeds` | `last_hidden_state` |
| `decoder_model_merged` | encoder mask and states, `inputs_embeds`, `past_key_values.*`, `use_cache_branch` | `logits`, `present.*` |

The merged decoder is an `If` of two graphs that share their weights, made by optimum. With a cache, its `present.*.encoder.*` are empty:
the caller keeps those of the first step. The batch axis of `past_key_values.*` is called `batch_size`, because transformers.js looks
for that name, and makes a cache of no rows, without an error, where it is called otherwise.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel
from optimum.onnx import merge_decoders
from torch import Tensor

from florence_onnx.bundles import bundle as bundles
from florence_onnx.errors import CheckpointError
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput

from ..bundles.writer import new_directory, versions
from ..checkpoints.checkpoint import Checkpoint
from ..checkpoints.json_files import write_json
from ..graphs.comparison import OutputError, compare, resized
from ..graphs.exporter import export_graph
from ..graphs.files import save, tidy
from ..graphs.plans import OPSET, GraphPlan
from ..graphs.vision_encoder import VisionEncoder
from ..precisions.recipes import FP16_MAX
from ..verification import checks
from ..verification.photograph import PHOTOGRAPH
from .configs import write_files
from .modules import EmbedTokens, Encoder, FirstDecoder, NextDecoder

Progress = Callable[[str], None]

_MERGED = "decoder_model_merged"
_FIRST = "decoder_model"
_NEXT = "decoder_with_past_model"


def export_transformers_js(
    checkpoint: Checkpoint,
    output: str | os.PathLike[str],
    *,
    precision: str = "fp32",
    images: Sequence[ImageInput] = (PHOTOGRAPH,),
    force: bool = False,
    progress: Progress = lambda step: None,
) -> bundles.Bundle:
    """Export, verify and write the layout of transformers.js.

    Args:
        checkpoint: What `load_checkpoint` returned.
        output: The directory to create.
        precision: `fp16` halves the weights; the files end in `_fp16`, their inputs and outputs stay fp32.
        images: What the verification asks about, see `checks.check_tokens`.
        force: Whether to replace an existing directory.
        progress: Called with what is done next.

    Returns:
        What lies on disk now; its `verification` has the errors by file and the tokens that agree by search.

    Raises:
        CheckpointError: The precision is unknown, or the directory exists.
        VerificationError: The graphs do not reproduce the checkpoint; nothing is left behind.
    """
    if precision not in ("fp32", "fp16"):
        raise CheckpointError(f"the transformers.js layout is written in fp32 or fp16, not {precision!r}")
    loaded = [decoding.load(image) for image in images]
    with new_directory(Path(output), force=force) as directory:
        graphs = _write_graphs(checkpoint, directory / "onnx", precision, progress)
        write_files(checkpoint, directory)
        progress("comparing answers with transformers")
        tokens = checks.check_tokens(checkpoint, bundles.read(directory, precision), loaded)
        verification = {"graphs": graphs, "tokens": tokens, "versions": versions()}
        measured = {"source": checkpoint.source, "verification": verification}
        write_json(directory / bundles.JS_VERIFICATION, measured)
    return bundles.read(Path(output), precision)


def _write_graphs(checkpoint: Checkpoint, folder: Path, precision: str, progress: Progress) -> dict[str, Any]:
    suffix = bundles.JS_SUFFIXES[precision]
    found: dict[str, Any] = {}
    decoders: list[GraphPlan] = []
    for plan in _plans(checkpoint):
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
        if plan.name in (_FIRST, _NEXT):
            decoders.append(plan)
        else:
            found[path.name] = summary
    progress(f"merging {_MERGED}")
    merged = folder / f"{_MERGED}{suffix}.onnx"
    first, following = decoders
    _merge(folder / f"{_FIRST}{suffix}.onnx", folder / f"{_NEXT}{suffix}.onnx", merged)
    found[merged.name] = checks.check_graph(merged.name, _merged_errors(merged, first, following), precision)
    return found


def _plans(checkpoint: Checkpoint) -> Iterator[GraphPlan]:
    model = checkpoint.model
    text = model.config.text_config
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    width, height = checkpoint.preprocessing.image_size
    batch = {0: "batch_size"}
    yield GraphPlan(
        "vision_encoder",
        VisionEncoder(model, checkpoint.preprocessing.image_size),
        {"pixel_values": noise(2, 3, height, width)},
        ["image_features"],
        {"pixel_values": batch, "image_features": batch},
    )
    ids = torch.randint(text.vocab_size, (2, 5), generator=generator)
    tokens = {0: "batch_size", 1: "sequence_length"}
    axes = {"input_ids": tokens, "inputs_embeds": tokens}
    yield GraphPlan("embed_tokens", EmbedTokens(model), {"input_ids": ids}, ["inputs_embeds"], axes)
    length = checkpoint.num_image_tokens + 4
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, -2:] = 0
    encoded = {0: "batch_size", 1: "encoder_sequence_length"}
    yield GraphPlan(
        "encoder_model",
        Encoder(model),
        {"attention_mask": mask, "inputs_embeds": noise(2, length, text.d_model)},
        ["last_hidden_state"],
        dict.fromkeys(("attention_mask", "inputs_embeds", "last_hidden_state"), encoded),
    )
    yield _first_plan(checkpoint, mask, noise)
    yield _next_plan(checkpoint, mask, noise)


def _cache_names(prefix: str, layers: int, parts: Sequence[str] = ("decoder", "encoder")) -> list[str]:
    """`prefix.0.decoder.key`, `prefix.0.decoder.value`, `prefix.0.encoder.key`, …"""
    return [f"{prefix}.{layer}.{part}.{kind}" for layer in range(layers) for part in parts for kind in ("key", "value")]


def _cache_axes(names: Sequence[str], decoder_length: str) -> dict[str, dict[int, str]]:
    lengths = {True: decoder_length, False: "encoder_sequence_length"}
    return {name: {0: "batch_size", 2: lengths[".decoder." in name]} for name in names}


def _first_plan(checkpoint: Checkpoint, mask: Tensor, noise: Callable[..., Tensor]) -> GraphPlan:
    text = checkpoint.config.text_config
    present = _cache_names("present", text.decoder_layers)
    new = {0: "batch_size", 1: "decoder_sequence_length"}
    encoded = {0: "batch_size", 1: "encoder_sequence_length"}
    return GraphPlan(
        _FIRST,
        FirstDecoder(checkpoint.model),
        {
            "encoder_attention_mask": mask,
            "encoder_hidden_states": noise(*mask.shape, text.d_model),
            "inputs_embeds": noise(2, 3, text.d_model),
        },
        ["logits", *present],
        {
            **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states"), encoded),
            **dict.fromkeys(("inputs_embeds", "logits"), new),
            **_cache_axes(present, "decoder_sequence_length"),
        },
    )


def _next_plan(checkpoint: Checkpoint, mask: Tensor, noise: Callable[..., Tensor]) -> GraphPlan:
    text = checkpoint.config.text_config
    heads = text.decoder_attention_heads
    past = _cache_names("past_key_values", text.decoder_layers)
    present = _cache_names("present", text.decoder_layers, ("decoder",))
    lengths = {True: 6, False: mask.shape[1]}
    new = {0: "batch_size", 1: "decoder_sequence_length"}
    return GraphPlan(
        _NEXT,
        NextDecoder(checkpoint.model),
        {
            "encoder_attention_mask": mask,
            "inputs_embeds": noise(2, 2, text.d_model),
            **{name: noise(2, heads, lengths[".decoder." in name], text.d_model // heads) for name in past},
        },
        ["logits", *present],
        {
            "encoder_attention_mask": {0: "batch_size", 1: "encoder_sequence_length"},
            **dict.fromkeys(("inputs_embeds", "logits"), new),
            **_cache_axes(past, "past_decoder_sequence_length"),
            **_cache_axes(present, "past_decoder_sequence_length + decoder_sequence_length"),
        },
    )


def _to_fp16(path: Path) -> None:
    """Halve a graph's weights and arithmetic in place; inputs and outputs stay fp32.

    The two halves of the decoder are converted before they are merged: converting the merged graph puts the casts of its outputs
    outside the `If` and lets a branch return an outer value, which ONNX Runtime rejects. LayerNormalization stays in fp32, as one
    operator, so ONNX Runtime's `SimplifiedLayerNormFusion` finds no casts to trip over.
    """
    converted = convert_float_to_float16(
        onnx.load(str(path)), keep_io_types=True, op_block_list=["LayerNormalization"], max_finite_val=FP16_MAX
    )
    # The converter appends its casts; `If` branches must be in order.
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
    """The errors of both branches; what a branch does not read is fed as a caller would: an empty cache, the encoder's states."""
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
