"""Precisions: one function per name, from an fp32 graph to the same graph in another precision.

A new precision (int8, int4, …) is one more entry of `CONVERSIONS`, and a tolerance in `verify.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

from .onnx_files import save, tidy

FP32_IO = ("pixel_values", "image_features", "logits")
"""Kept in fp32 at every precision: what the caller hands over, keeps and searches. Caches follow the precision."""

FP32_OPS = ("LayerNormalization",)
"""Left in fp32 by fp16: sums over channels lose beams otherwise (seen by users of other ports)."""

FP16_MAX = 65504.0
"""Largest finite half-precision number (IEEE 754)."""


def to_fp16(path: Path) -> None:
    """Halves weights, activations and caches, in place.

    Runs on the CPU provider too: ONNX Runtime casts around the operators that it has in fp32 only. Normalisation stays
    in fp32 as a single operator, so nothing is left for `SimplifiedLayerNormFusion` to mistake.
    """
    model = onnx.load(str(path))
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    converted = convert_float_to_float16(
        model,
        keep_io_types=sorted(names & set(FP32_IO)),
        op_block_list=list(FP32_OPS),
        # the converter clips what fp16 cannot hold: -inf, the mask of the attention, becomes its lowest number
        max_finite_val=FP16_MAX,
    )
    save(converted, path)
    tidy(path)


CONVERSIONS: dict[str, Callable[[Path], None]] = {"fp16": to_fp16}
"""By the name that the command line, the bundle and `from_pretrained` use; fp32 is what is exported."""
