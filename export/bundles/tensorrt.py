"""`--tensorrt`: TensorRT engines for a bundle that was just exported.

They are built by `florence_onnx.loading`, which needs no PyTorch; `florence-onnx build-engines` does the same on the
machine where the engines will run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnxruntime

from florence_onnx import loading
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import CheckpointError
from florence_onnx.runtime import tensorrt

PRECISIONS = ("fp32", "fp16")
"""Precisions for which engines can be built."""


def check_tensorrt(precisions: Sequence[str], is_own_layout: bool, max_batch: int) -> None:
    """Checks, before an export that takes minutes, whether its engines can be built.

    Args:
        precisions: Precisions of the export.
        is_own_layout: Whether bundles are written, and not the layout of transformers.js.
        max_batch: Most prompts that the engines take together.

    Raises:
        CheckpointError: Engines of a precision or of the layout are not supported.
        ProviderError: There is no GPU, or TensorRT is missing.
    """
    wrong = [precision for precision in precisions if precision not in PRECISIONS]
    if wrong or not is_own_layout:
        what = f"precision {wrong[0]}" if wrong else "the layout of transformers.js"
        raise CheckpointError(
            f"TensorRT engines of {what} are not supported: export with --precision fp16 and without --layout"
        )
    tensorrt.target(onnxruntime, max_batch)


def build_engines(bundle: Bundle, max_batch: int, progress: Callable[[str], None]) -> tensorrt.Engines:
    """Builds the engines of a bundle.

    Args:
        bundle: A bundle on disk.
        max_batch: Most prompts that the engines take together.
        progress: Called with a line of text before the build.

    Raises:
        ProviderError: TensorRT rejects a graph. The bundle is kept.
    """
    progress(f"building TensorRT engines of {bundle.path.name}: minutes")
    return loading.build_engines(bundle, max_batch)
