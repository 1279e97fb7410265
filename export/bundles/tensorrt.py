"""`--tensorrt`: engines beside a bundle that was just exported.

What builds them is `florence_onnx.loading`, which needs no PyTorch, so that `florence-onnx build-engines` can do the same on the
machine where they are going to run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnxruntime

from florence_onnx import loading
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import CheckpointError
from florence_onnx.runtime import tensorrt

PRECISIONS = ("fp32", "fp16")
"""Of which there are engines."""


def check_tensorrt(precisions: Sequence[str], is_own_layout: bool, max_batch: int) -> None:
    """Says before an export, which takes minutes, why its engines could not be built.

    Raises:
        CheckpointError: There are no engines of a precision or layout.
        ProviderError: There is no card, or TensorRT is missing.
    """
    wrong = [precision for precision in precisions if precision not in PRECISIONS]
    if wrong or not is_own_layout:
        what = f"precision {wrong[0]}" if wrong else "the layout of transformers.js"
        raise CheckpointError(
            f"there are no TensorRT engines of {what}: export with --precision fp16 and without --layout"
        )
    tensorrt.target(onnxruntime, max_batch)


def build_engines(bundle: Bundle, max_batch: int, progress: Callable[[str], None]) -> tensorrt.Engines:
    """Builds the engines of a bundle.

    Args:
        bundle: As it lies on disk.
        max_batch: Most prompts that they take together.
        progress: Called with what is done next.

    Raises:
        ProviderError: TensorRT refuses a graph; the bundle itself stays.
    """
    progress(f"building TensorRT engines of {bundle.path.name}: minutes")
    return loading.build_engines(bundle, max_batch)
