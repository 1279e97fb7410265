"""The graphs of a bundle: names, example inputs, dynamic axes, and the inputs that each is checked on.

There is a vision encoder for each image size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from florence_onnx.bundles import bundle

from ..checkpoints.checkpoint import Checkpoint
from .comparison import DynamicAxes
from .decoder import Decoder
from .exporter import GraphReport, export_graph
from .text_encoder import TextEncoder
from .vision_encoder import VisionEncoder

OPSET = 18
"""ONNX operator set. LayerNormalization needs 17; TensorRT 10.3 and ONNX Runtime 1.18 read 18."""


@dataclass(frozen=True)
class GraphPlan:
    """What one graph is exported from and checked on."""

    name: str
    """File name in the bundle."""
    module: nn.Module
    inputs: dict[str, Tensor]
    """Example inputs by name, in the order of the module's arguments."""
    outputs: list[str]
    """Output names, in the order in which the module returns them."""
    dynamic_axes: DynamicAxes
    check_inputs: tuple[dict[str, Tensor], ...] = ()
    """More inputs to check on, of other sizes."""


def plans(checkpoint: Checkpoint) -> list[GraphPlan]:
    """Returns the plans of the vision encoders, the default size first, of the text encoder and of the decoder."""
    first, others = checkpoint.preprocessing.image_size, checkpoint.other_image_sizes
    vision = [_vision_plan(checkpoint, bundle.VISION_ENCODER, first)]
    vision += [_vision_plan(checkpoint, bundle.vision_encoder_name(size), size) for size in others]
    num_image_tokens = checkpoint.num_image_tokens
    return [*vision, _text_encoder_plan(checkpoint, num_image_tokens), _decoder_plan(checkpoint, num_image_tokens)]


def export_graphs(
    checkpoint: Checkpoint, directory: Path, *, progress: Callable[[str], None] = lambda step: None
) -> Iterator[GraphReport]:
    """Exports every graph in fp32 and compares it with its module.

    Args:
        checkpoint: The model.
        directory: The folder for the `.onnx` files.
        progress: Called with a graph's file name before it is exported.

    Yields:
        The report of each graph.

    Raises:
        VerificationError: A graph does not reproduce its module.
    """
    for plan in plans(checkpoint):
        progress(plan.name)
        yield export_graph(
            plan.module,
            directory / plan.name,
            inputs=plan.inputs,
            outputs=plan.outputs,
            dynamic_axes=plan.dynamic_axes,
            opset=OPSET,
            check_inputs=plan.check_inputs,
        )


def _vision_plan(checkpoint: Checkpoint, name: str, image_size: tuple[int, int]) -> GraphPlan:
    module = VisionEncoder(checkpoint.model, image_size, is_shared=bool(checkpoint.other_image_sizes))
    width, height = image_size
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    axes = {"pixel_values": {0: "batch"}, "image_features": {0: "batch"}}
    return GraphPlan(name, module, {"pixel_values": pixels}, ["image_features"], axes)


def cache_names(prefix: str, num_layers: int) -> list[str]:
    """Returns `prefix.0.key`, `prefix.0.value`, `prefix.1.key`, …"""
    return [f"{prefix}.{layer}.{part}" for layer in range(num_layers) for part in ("key", "value")]


def _text_encoder_plan(checkpoint: Checkpoint, num_image_tokens: int) -> GraphPlan:
    text = checkpoint.model.config.text_config
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    inputs = {
        "input_ids": torch.randint(3, text.vocab_size, (2, 7), generator=generator),
        "attention_mask": mask,
        "image_features": torch.randn(2, num_image_tokens, text.d_model, generator=generator),
    }
    prompt = {0: "prompts", 1: "text_length"}
    is_sized = not checkpoint.other_image_sizes
    features = {0: "prompts"} if is_sized else {0: "prompts", 1: "image_tokens"}
    axes = {"input_ids": prompt, "attention_mask": prompt, "image_features": features}
    outputs = cache_names("cross_key_values", text.decoder_layers)
    axes |= {name: {0: "prompts", (3 if name.endswith(".key") else 2): "encoder_length"} for name in outputs}
    return GraphPlan(bundle.TEXT_ENCODER, TextEncoder(checkpoint.model, is_sized=is_sized), inputs, outputs, axes)


def _decoder_plan(checkpoint: Checkpoint, num_image_tokens: int) -> GraphPlan:
    layers = checkpoint.model.config.text_config.decoder_layers
    cross, past = cache_names("cross_key_values", layers), cache_names("past_key_values", layers)
    present = cache_names("present", layers)
    length = num_image_tokens + 5
    tokens = {0: "prompts", 1: "length"}
    axes: dict[str, dict[int, str]] = {
        "input_ids": tokens,
        "positions": tokens,
        "slots": tokens,
        "visible": tokens | {2: "capacity"},
        "encoder_attention_mask": {0: "prompts", 1: "encoder_length"},
        "logits": tokens,
    }
    axes |= {name: {0: "prompts", (3 if name.endswith(".key") else 2): "encoder_length"} for name in cross}
    axes |= {name: {0: "prompts", 2: "capacity"} for name in (*past, *present)}
    return GraphPlan(
        bundle.DECODER,
        Decoder(checkpoint.model),
        _decoder_inputs(checkpoint, prompts=2, num_tokens=2, length=length, capacity=16),
        ["logits", *present],
        axes,
        check_inputs=(
            _decoder_inputs(checkpoint, prompts=2, num_tokens=1, length=length + 3, capacity=24),
            _decoder_inputs(checkpoint, prompts=1, num_tokens=1, length=length, capacity=8),
            _decoder_inputs(checkpoint, prompts=1, num_tokens=5, length=length, capacity=12),
        ),
    )


def _decoder_inputs(
    checkpoint: Checkpoint, *, prompts: int, num_tokens: int, length: int, capacity: int
) -> dict[str, Tensor]:
    text = checkpoint.model.config.text_config
    layers, heads = text.decoder_layers, text.decoder_attention_heads
    size, first = text.d_model // heads, 3
    generator = torch.Generator().manual_seed(prompts * num_tokens)
    mask = torch.ones(prompts, length, dtype=torch.long)
    mask[-1, -2:] = 0
    # As in beam search, each new token sees part of the history and itself, and none of the other new tokens.
    visible = torch.rand(prompts, num_tokens, capacity, generator=generator) < 0.6
    visible[..., first:] = False
    slots = first + torch.stack([torch.randperm(num_tokens, generator=generator) for _ in range(prompts)])
    visible.scatter_(2, slots[..., None], True)
    inputs = {
        "input_ids": torch.randint(3, text.vocab_size, (prompts, num_tokens), generator=generator),
        "positions": torch.randint(0, capacity, (prompts, num_tokens), generator=generator),
        "slots": slots,
        "visible": visible,
        "encoder_attention_mask": mask,
    }
    for name in cache_names("cross_key_values", layers):
        inner = (size, length) if name.endswith(".key") else (length, size)
        inputs[name] = torch.randn(prompts, heads, *inner, generator=generator)
    for name in cache_names("past_key_values", layers):
        inputs[name] = torch.randn(prompts, heads, capacity, size, generator=generator)
    return inputs
