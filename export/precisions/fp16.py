"""fp32 graphs to fp16."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from ..graphs.files import save, tidy

FP32_IO = ("pixel_values", "image_features", "logits")
"""Inputs and outputs that stay fp32 in every precision, because the host reads or writes them. KV caches do not."""

FP16_MAX = 65504.0
"""Largest finite half-precision number (IEEE 754)."""


def to_fp16(path: Path) -> None:
    """Converts weights, activations and KV caches to fp16, in place.

    The graph also runs on the CPU provider, where ONNX Runtime inserts casts around operators that it has in fp32 only.

    Layer normalisation has fp16 inputs and outputs, and computes its mean and variance in fp32 (`stash_type` 1, ONNX's
    default); in fp16 they cost other ports beams. The CUDA provider's fused form needs
    `enable_skip_layer_norm_strict_mode` for that, which `florence_onnx.runtime.providers` sets. Casts to fp32 around
    the operator would change no answer, and prevent its fusion with the residual sum before it.
    """
    model = onnx.load(str(path))
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    converted = convert_float_to_float16(
        model,
        keep_io_types=sorted(names & set(FP32_IO)),
        op_block_list=[],
        # The converter clips constants to this: -inf in attention masks becomes -65504, which softmax still takes to 0.
        max_finite_val=FP16_MAX,
    )
    # The converter appends its casts at the end, but ONNX requires nodes in topological order.
    OnnxModel(converted).topological_sort()
    save(converted, path)
    tidy(path)
