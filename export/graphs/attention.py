"""Parts of attention that the graphs share, written so that they are exported as few operators.

Shapes use A rows (images or prompts), H heads, B positions of the queries, L positions of the keys, d head size, D = H·d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

POSITION_OFFSET = 2
"""BART's position table starts two rows late (transformers, `BartLearnedPositionalEmbedding`)."""


class _KeepAxes(torch.autograd.Function):
    """Reshapes all axes but the first ones, as one `Reshape` by a constant, whatever sizes those have.

    torch's own export of a reshape computes the shape from its input, in five nodes that run on the host at every call,
    and of which ONNX Runtime cannot infer that the first axes stay: the fusion of residual and normalisation, which
    wants equal shapes, then never happens.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, num_kept: int, *sizes: int) -> Tensor:
        return states.reshape(*states.shape[:num_kept], *sizes)

    @staticmethod
    def symbolic(graph: Any, states: Any, num_kept: int, *sizes: int) -> Any:
        # 0 stands for the input's own size, -1 for what remains; torch's own inference insists on seeing the latter
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
    """0 where visible, -inf elsewhere, to be added to attention scores."""
    return torch.where(visible, 0.0, float("-inf"))


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Args: query `(A, H, B, d)`, scaled; key `(A, H, d, L)`; value `(A, H, L, d)`; bias broadcastable to `(A, H, B, L)`."""
    return (query @ key + bias).softmax(-1) @ value


class Projection(nn.Module):
    """Linear layers over the same input as one product, `(…, D)` to `(…, sum of their widths)`.

    The weights are copies: the scale of the attention is folded into the query's, and the checkpoint's own must stay.
    """

    def __init__(self, *layers: nn.Linear, scales: tuple[float, ...] = ()) -> None:
        super().__init__()
        factors = (*scales, *[1.0] * (len(layers) - len(scales)))
        pairs = list(zip(layers, factors, strict=True))
        self.weight = nn.Parameter(torch.cat([layer.weight.detach() * factor for layer, factor in pairs]), False)
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() * factor for layer, factor in pairs]), False)

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear(states, self.weight, self.bias)
