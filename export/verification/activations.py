"""Whether a checkpoint itself computes finite numbers; if not, an export has nothing to reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from florence_onnx import tasks
from florence_onnx.errors import CheckpointError
from florence_onnx.images import decoding, preprocessing
from florence_onnx.images.decoding import ImageInput

from ..checkpoints.checkpoint import Checkpoint
from . import reference


def check_activations(checkpoint: Checkpoint, images: Sequence[ImageInput]) -> None:
    """Runs the checkpoint in PyTorch, in float32, once for each image.

    Raises:
        CheckpointError: A layer gives NaN or infinity; the message names the first.
    """
    inputs = checkpoint.preprocessing
    for image in images:
        pixels = preprocessing.preprocess(
            decoding.load(image), size=inputs.image_size, mean=inputs.image_mean, std=inputs.image_std
        )
        with _Watch(checkpoint.reference) as watch:
            encoded = reference.encode(checkpoint, pixels, [tasks.OBJECT_DETECTION.format_prompt()])
            reference.score(checkpoint, encoded, (checkpoint.reference.generation_config.decoder_start_token_id, 0, 0))
        if watch.first is not None:
            raise CheckpointError(
                f"the checkpoint overflows: in float32 the output of its layer {watch.first}. PyTorch gives no usable "
                "answers "
                "either: the training diverged, or the weights of that layer and of those before it are damaged; take "
                "an earlier "
                "checkpoint"
            )


class _Watch:
    """Notes the first layer of a model whose output is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.first: str | None = None
        self._layers = {layer: name for name, layer in model.named_modules() if not list(layer.children())}
        self._handles = [layer.register_forward_hook(self._look) for layer in self._layers]

    def _look(self, layer: nn.Module, _: Any, output: Any) -> None:
        if self.first is None and isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
            counts = (
                f"{int(output.isnan().sum())} NaN and {int(output.isinf().sum())} infinite of {output.numel()} values"
            )
            self.first = f"{self._layers[layer]} has {counts}"

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
