"""fp32 graphs to fp16."""

from __future__ import annotations

from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from ..graphs.files import save, tidy

FP32_IO = ("pixel_values", "image_features", "logits")
"""Kept in fp32 at every precision: what the caller hands over, keeps and searches. Caches follow the precision."""

FP16_MAX = 65504.0
"""Largest finite half-precision number (IEEE 754)."""


def to_fp16(path: Path) -> None:
    """Halves weights, activations and caches, in place.

    Runs on the CPU provider too: ONNX Runtime casts around the operators that it has in fp32 only. Normalisation takes and
    gives fp16, and sums in fp32 inside the operator (`stash_type` 1, ONNX's default), without which beams were lost in other
    ports; the CUDA provider's fused form does so under `enable_skip_layer_norm_strict_mode`, which `providers` sets. Casts
    around it, as they were here once, change nothing in the answers and keep it from being fused with the sum before it.
    """
    model = onnx.load(str(path))
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    converted = convert_float_to_float16(
        model,
        keep_io_types=sorted(names & set(FP32_IO)),
        op_block_list=[],
        # the converter clips what fp16 cannot hold: -inf, the mask of the attention, becomes its lowest number
        max_finite_val=FP16_MAX,
    )
    # the converter adds its casts at the end, and ONNX wants nodes in the order in which they can run
    OnnxModel(converted).topological_sort()
    save(converted, path)
    tidy(path)
