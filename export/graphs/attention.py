"""Parts of attention that the graphs share, written so that they are exported as few operators.

Shapes use A rows (images or prompts), H heads, B positions of the queries, L positions of the keys, d head size, D =
H·d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

POSITION_OFFSET = 2
"""BART's position table has two unused rows before position 0 (transformers, `BartLearnedPositionalEmbedding`)."""


class _KeepAxes(torch.autograd.Function):
    """Reshapes all axes but the first ones, of whatever size, exported as one `Reshape` by a constant.

    torch exports a reshape as five nodes that compute the new shape from the input's shape, on the host and in every
    call. ONNX Runtime cannot infer from them that the first axes keep their sizes, and so does not fuse the residual
    sum with the layer normalisation after it, which needs equal shapes.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, num_kept: int, *sizes: int) -> Tensor:
        return states.reshape(*states.shape[:num_kept], *sizes)

    @staticmethod
    def symbolic(graph: Any, states: Any, num_kept: int, *sizes: int) -> Any:
        # In Reshape, 0 keeps the input's size and -1 is computed. torch's shape inference requires the -1.
        shape = [0] * num_kept + [*sizes[:-1], -1]
        return graph.op("Reshape", states, graph.op("Constant", value_t=torch.tensor(shape)))


# torch leaves `apply` untyped
keep_axes: Any = _KeepAxes.apply


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """`(A, B, H·d)` to `(A, H, B, d)`."""
    split: Tensor = keep_axes(states, 2, num_heads, int(states.shape[-1]) // num_heads)
    return split.transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """`(A, H, B, d)` to `(A, B, H·d)`."""
    merged: Tensor = keep_axes(states.transpose(1, 2), 2, int(states.shape[1]) * int(states.shape[3]))
    return merged


def masking_bias(visible: Tensor) -> Tensor:
    """Returns the bias of attention scores: 0 where visible, -inf elsewhere."""
    return torch.where(visible, 0.0, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Computes scaled dot-product attention: `(A, H, B, d)`.

    Args:
        query: `(A, H, B, d)`, multiplied by the scale of the attention.
        key: `(A, H, d, L)`.
        value: `(A, H, L, d)`.
        bias: Added to the scores; broadcastable to `(A, H, B, L)`.
    """
    return (query @ key + bias).softmax(-1) @ value


class Projection(nn.Module):
    """Linear layers over the same input, concatenated into one product: `(…, D)` to `(…, sum of their widths)`.

    Args:
        layers: The layers, in the order of their outputs.
        scales: Factors of the first layers' outputs, folded into weight and bias: `s·(Wx + b) = (sW)x + sb`.

    This saves operators in every call: one product instead of several, and none for the scale 1/√d of the attention.
    The weights are copies, because the checkpoint's own stay unscaled as the reference of the verification.
    """

    def __init__(self, *layers: nn.Linear, scales: tuple[float, ...] = ()) -> None:
        super().__init__()
        factors = (*scales, *[1.0] * (len(layers) - len(scales)))
        pairs = list(zip(layers, factors, strict=True))
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() * factor for layer, factor in pairs]), False)
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() * factor for layer, factor in pairs]), False)

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.weight, self.bias)
