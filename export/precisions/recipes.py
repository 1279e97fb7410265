"""Precisions: one recipe per name, from fp32 graphs to the same graphs in another precision.

A new precision is one more entry of `PRECISIONS`, and a tolerance in `verification/checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from florence_onnx.bundles import bundle

from ..graphs.files import save, tidy
from .quantization import to_blocks, to_dynamic_int8

FP32_IO = ("pixel_values", "image_features", "logits")
"""Kept in fp32 at every precision: what the caller hands over, keeps and searches. Caches follow the precision."""

FP16_MAX = 65504.0
"""Largest finite half-precision number (IEEE 754)."""

Conversion = Callable[[Path], None]
"""Rewrites a graph in place."""


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


@dataclass(frozen=True)
class Recipe:
    """What becomes of each graph; None leaves it in fp32."""

    vision_encoder: Conversion | None = None
    text_encoder: Conversion | None = None
    decoder: Conversion | None = None

    def conversion(self, graph: str) -> Conversion | None:
        """The conversion of a graph, named as in `florence_onnx.bundles.bundle.GRAPHS`."""
        by_name = {
            bundle.VISION_ENCODER: self.vision_encoder,
            bundle.TEXT_ENCODER: self.text_encoder,
            bundle.DECODER: self.decoder,
        }
        return by_name[graph]


_VISION_INT8 = partial(to_dynamic_int8, kinds=("Gemm",))

PRECISIONS: dict[str, Recipe] = {
    "fp32": Recipe(),
    "fp16": Recipe(to_fp16, to_fp16, to_fp16),
    "int8": Recipe(_VISION_INT8, to_dynamic_int8, partial(to_blocks, bits=8)),
    "int4": Recipe(_VISION_INT8, to_dynamic_int8, partial(to_blocks, bits=4)),
}
"""By the name that the command line, the bundle and `from_pretrained` use."""

VISION_PRECISIONS = tuple(PRECISIONS)[:3]
"""What the vision encoder may have by itself; int4 would be its int8."""
