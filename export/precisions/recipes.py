"""Precisions: one recipe per name, from fp32 graphs to the same graphs in another precision.

A new precision is one more entry of `PRECISIONS`, and a tolerance in `verification/checks.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from florence_onnx.bundles import bundle

from .fp16 import to_fp16
from .quantization import to_blocks, to_dynamic_int8

Conversion = Callable[[Path], None]
"""Rewrites a graph in place."""


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
