"""The precisions by name: a recipe says how each graph is converted from fp32.

To add a precision, add an entry to `PRECISIONS`, and its bound to `MAX_RELATIVE_ERROR` in `verification/checks.py`.
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
"""Rewrites an `.onnx` file in place."""


@dataclass(frozen=True)
class Recipe:
    """The conversion of each graph; None leaves it in fp32."""

    vision_encoder: Conversion | None = None
    text_encoder: Conversion | None = None
    decoder: Conversion | None = None

    def conversion(self, graph: str) -> Conversion | None:
        """Returns the conversion of a graph, given its file name in `florence_onnx.bundles.bundle`."""
        if bundle.is_vision_encoder(graph):
            return self.vision_encoder
        return {bundle.TEXT_ENCODER: self.text_encoder, bundle.DECODER: self.decoder}[graph]


# The MatMul nodes of the vision encoder stay in fp32: see `to_dynamic_int8`.
_VISION_INT8 = partial(to_dynamic_int8, kinds=("Gemm",))

PRECISIONS: dict[str, Recipe] = {
    "fp32": Recipe(),
    "fp16": Recipe(to_fp16, to_fp16, to_fp16),
    "int8": Recipe(_VISION_INT8, to_dynamic_int8, partial(to_blocks, bits=8)),
    "int4": Recipe(_VISION_INT8, to_dynamic_int8, partial(to_blocks, bits=4)),
}
"""Recipes by the name that the command line, the bundle and `from_pretrained` use."""

VISION_PRECISIONS = tuple(PRECISIONS)[:3]
"""Precisions that can be chosen for the vision encoder alone: fp32, fp16, int8. In int4 its recipe is that of int8."""
