"""The vision encoder (DaViT) as a torch module, written for export: a fixed image size, no control flow.

It borrows the weights of a transformers `Florence2ForConditionalGeneration` and computes what its modules compute.
Shapes use B images, N image tokens, C channels of a stage, D columns of the image features.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

from .attention import keep_axes, merge_heads, split_heads


def with_residual(conv: nn.Conv2d) -> nn.Conv2d:
    """Folds the residual into a depthwise convolution: `x + conv(x)` only adds 1 to the centre of its kernel."""
    folded = copy.deepcopy(conv)
    height, width = folded.kernel_size
    with torch.no_grad():
        folded.weight[:, 0, height // 2, width // 2] += 1
    return folded


def with_scale(weight: Tensor, bias: Tensor, scale: float) -> nn.Linear:
    """Folds a factor into a linear layer: `scale * (x W' + b)`."""
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight * scale)
        linear.bias.copy_(bias * scale)
    return linear


def _to_grid(states: Tensor, size: tuple[int, int]) -> Tensor:
    """`(B, H·W, C)` to `(B, H, W, C)`."""
    grid: Tensor = keep_axes(states, 1, *size, int(states.shape[2]))
    return grid


def _to_tokens(grid: Tensor) -> Tensor:
    """`(B, H, W, C)` to `(B, H·W, C)`."""
    height, width, channels = (int(size) for size in grid.shape[1:])
    states: Tensor = keep_axes(grid, 1, height * width, channels)
    return states


def _convolve(conv: nn.Conv2d, states: Tensor, size: tuple[int, int]) -> Tensor:
    """Applies a convolution to tokens `(B, H·W, C)`.

    ONNX Runtime's CPU provider computes convolutions in a layout of blocked channels (NCHWc). If the permutations
    between NHWC and NCHW are four-dimensional and adjacent to the convolution, its conversion to and from that layout
    absorbs them; otherwise each is a pass over all activations.
    """
    return _to_tokens(conv(_to_grid(states, size).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def _apply(linear: nn.Module, states: Tensor) -> Tensor:
    """Applies a layer to tokens `(B, N, C)` as a two-dimensional product.

    It is exported as one `Gemm` with its bias, and a three-dimensional one as `MatMul` and `Add`. The int8 recipe
    quantizes the `Gemm` nodes.
    """
    flat: Tensor = linear(states.reshape(-1, int(states.shape[2])))
    return flat.reshape(-1, int(states.shape[1]), int(flat.shape[1]))


class _ConvEmbed(nn.Module):
    """Patch embedding: pixels `(B, 3, H, W)`, or tokens `(B, H·W, C)` of the stage before, to a stage's tokens.

    `size` is the grid `(H, W)` of the input tokens, or None for pixels.
    """

    def __init__(self, source: Any, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.conv: nn.Conv2d = source.conv
        self.norm: nn.LayerNorm = source.norm
        self.pre_norm: bool = source.pre_norm
        self.size = size

    def forward(self, states: Tensor) -> Tensor:
        if self.size is None:
            states = _to_tokens(self.conv(states).permute(0, 2, 3, 1))
        else:
            states = _convolve(self.conv, self.norm(states) if self.pre_norm else states, self.size)
        return states if self.pre_norm else self.norm(states)


class WindowAttention(nn.Module):
    """Attention within windows of w x w tokens: `(B, H·W, C)` to `(B, H·W, C)`.

    Windows that reach over the edge are padded with zeros. Those tokens are attended to, as in the original.

    The grid is not split into windows first, which would be a permutation of its own. Tokens stay in row-major order
    through the projections, and the permutation that splits queries, keys and values by head sorts them by window as
    well.
    """

    def __init__(self, source: Any, size: tuple[int, int]) -> None:
        super().__init__()
        weights, biases = source.qkv.weight.chunk(3), source.qkv.bias.chunk(3)
        self.query = with_scale(weights[0], biases[0], source.scale)
        self.key = with_scale(weights[1], biases[1], 1.0)
        self.value = with_scale(weights[2], biases[2], 1.0)
        self.proj: nn.Linear = source.proj
        self.num_heads: int = source.num_heads
        self.window: int = source.window_size
        self.size = size

    def forward(self, states: Tensor) -> Tensor:
        (height, width), window = self.size, self.window
        right, bottom = -width % window, -height % window
        if right or bottom:
            states = _to_tokens(functional.pad(_to_grid(states, self.size), (0, 0, 0, right, 0, bottom)))
        rows, columns = (height + bottom) // window, (width + right) // window
        query, key, value = (
            self._windows(_apply(linear, states), rows, columns) for linear in (self.query, self.key, self.value)
        )
        attended = (query @ key.transpose(2, 3)).softmax(-1) @ value
        attended = attended.reshape(-1, rows, columns, self.num_heads, window, window, int(attended.shape[-1]))
        attended = attended.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, int(states.shape[1]), int(states.shape[2]))
        if right or bottom:
            attended = _to_tokens(_to_grid(attended, (rows * window, columns * window))[:, :height, :width])
        return _apply(self.proj, attended)

    def _windows(self, states: Tensor, rows: int, columns: int) -> Tensor:
        """`(B, H·W, heads·d)` to `(B·windows, heads, w·w, d)`."""
        window = self.window
        size = int(states.shape[-1]) // self.num_heads
        split = states.reshape(-1, rows, window, columns, window, self.num_heads, size)
        return split.permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, self.num_heads, window * window, size)


class ChannelAttention(nn.Module):
    """Attention of channels to channels within groups, over all N tokens: `(B, N, C)` to `(B, N, C)`.

    The scores of a group are `Q'K`, sums over the tokens, and depend on the tokens `x` only through `x'x` and their sum
    `s`: `(x Wq + bq)'(x Wk + bk) = Wq'(x'x)Wk + (Wq's)bk' + bq(Wk's)' + N bq bk'`. The rest is linear in each token:
    value projection, attention `A` and output projection are one product with `Wv A' Wp`. That is two products over all
    tokens (`x'x` and this one) instead of four, in Florence-2-base 6 % less arithmetic.

    fp16 ends at 65504, which `x'x` and `s` exceed as sums over up to 36864 tokens. Therefore they are computed from
    `x / r`, r being the power of two nearest to √N: then `x'x` is divided by about N, and is a mean instead of a sum.
    The buffers that multiply the sums make up for the factor. Powers of two change only the exponent, so the fp32
    result is the same to the last bit.
    """

    query: Tensor
    query_of_total: Tensor
    query_bias: Tensor
    key: Tensor
    key_bias: Tensor
    constant: Tensor
    value: Tensor
    proj: Tensor
    proj_bias: Tensor

    def __init__(self, source: Any, num_tokens: int) -> None:
        super().__init__()
        groups, channels = source.groups, source.proj.weight.shape[0]
        scale = num_tokens**-0.5
        weights = [weight.detach() for weight in source.qkv.weight.chunk(3)]
        biases = [bias.detach().reshape(groups, -1, 1) for bias in source.qkv.bias.chunk(3)]
        query = weights[0].reshape(groups, -1, channels) * scale
        self.shrink: float = 2.0 ** -round(math.log2(num_tokens) / 2)
        self.register_buffer("query", query / self.shrink**2)
        self.register_buffer("query_of_total", query / self.shrink)
        self.register_buffer("query_bias", biases[0] * scale / self.shrink)
        self.register_buffer("key", weights[1].t().contiguous())
        self.register_buffer("key_bias", biases[1].transpose(1, 2).contiguous())
        self.register_buffer("constant", num_tokens * biases[0] * scale @ biases[1].transpose(1, 2))
        # The bias is appended as one more input channel, so that one product applies A to both.
        value = torch.cat([weights[2].reshape(groups, -1, channels), biases[2]], dim=2)
        self.register_buffer("value", value.transpose(1, 2).contiguous())
        self.register_buffer("proj", source.proj.weight.detach().t().contiguous())
        self.register_buffer("proj_bias", source.proj.bias.detach())
        self.groups: int = groups

    def forward(self, states: Tensor) -> Tensor:
        attention = self._scores(states).softmax(-1)
        merged = merge_heads(self.value @ attention.transpose(2, 3)) @ self.proj
        return states @ merged[:, :-1] + (merged[:, -1:] + self.proj_bias)

    def _scores(self, states: Tensor) -> Tensor:
        """Returns the attention scores `(B, groups, d, d)`, queries by keys."""
        # The sum over tokens is a product with ones: ONNX Runtime's ReduceSum over rows is ten times slower.
        ones = states.new_ones(1, int(states.shape[1]))
        states = states * self.shrink
        total = (ones @ states)[:, 0, None, :, None]
        by_key = split_heads((states.transpose(1, 2) @ states) @ self.key, self.groups)
        size = int(self.key.shape[1]) // self.groups
        key_total = keep_axes(total[:, 0, :, 0] @ self.key, 1, self.groups, 1, size)
        scores: Tensor = self.query @ by_key + (self.query_of_total @ total) * self.key_bias
        return scores + self.query_bias * key_total + self.constant


class DirectChannelAttention(nn.Module):
    """The same attention, computed from queries, keys and values of every token.

    Less arithmetic than `ChannelAttention` if there are fewer tokens than channels.
    """

    def __init__(self, source: Any, num_tokens: int) -> None:
        super().__init__()
        weights, biases = source.qkv.weight.chunk(3), source.qkv.bias.chunk(3)
        self.query = with_scale(weights[0], biases[0], num_tokens**-0.5)
        self.key = with_scale(weights[1], biases[1], 1.0)
        self.value = with_scale(weights[2], biases[2], 1.0)
        self.proj: nn.Linear = source.proj
        self.groups: int = source.groups

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            split_heads(_apply(linear, states), self.groups) for linear in (self.query, self.key, self.value)
        )
        attention = (query.transpose(2, 3) @ key).softmax(-1)
        return _apply(self.proj, merge_heads(value @ attention.transpose(2, 3)))


class SharedDirectChannelAttention(nn.Module):
    """`DirectChannelAttention` with weights that do not depend on N: the factor N^-½ multiplies the queries.

    Bundles for several image sizes store such weights once.
    """

    def __init__(self, source: Any, num_tokens: int) -> None:
        super().__init__()
        self.query, self.key, self.value = _split_projections(source)
        self.proj: nn.Linear = source.proj
        self.groups: int = source.groups
        self.scale: float = num_tokens**-0.5

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            split_heads(_apply(linear, states), self.groups) for linear in (self.query, self.key, self.value)
        )
        # Queries are scaled and not the scores, which are sums over the tokens and might exceed fp16.
        attention = ((query * self.scale).transpose(2, 3) @ key).softmax(-1)
        return _apply(self.proj, merge_heads(value @ attention.transpose(2, 3)))


class SharedChannelAttention(nn.Module):
    """`ChannelAttention` with the weights of `SharedDirectChannelAttention`, byte by byte.

    Weights are left factors here, `W (x'x)` instead of `(x'x) W'`, so that each is read in the layout of a linear layer:
    the transpose of a weight would be other bytes, and would be stored as well.
    """

    def __init__(self, source: Any, num_tokens: int) -> None:
        super().__init__()
        self.query, self.key, self.value = _split_projections(source)
        self.proj: nn.Linear = source.proj
        self.groups: int = source.groups
        self.num_tokens = num_tokens
        self.shrink: float = 2.0 ** -round(math.log2(num_tokens) / 2)

    def forward(self, states: Tensor) -> Tensor:
        attention = self._scores(states).softmax(-1)
        channels = int(states.shape[2])
        product = keep_axes((attention @ self._by_group(self.value.weight)).flatten(1, 2), 1, channels, channels)
        bias = keep_axes((attention @ self._by_group(self.value.bias)).flatten(1, 2), 1, channels, 1)
        bias = (self.proj.weight @ bias).transpose(1, 2) + self.proj.bias
        return states @ (self.proj.weight @ product).transpose(1, 2) + bias

    def _by_group(self, tensor: Tensor) -> Tensor:
        """`(C, …)` to `(groups, d, …)`; a bias gets a last axis of 1."""
        return tensor.reshape(self.groups, -1, int(tensor.shape[1]) if tensor.dim() == 2 else 1)

    def _scores(self, states: Tensor) -> Tensor:
        """Returns the attention scores `(B, groups, d, d)`, queries by keys; `ChannelAttention` explains the terms."""
        channels = int(states.shape[2])
        size, scale = channels // self.groups, self.num_tokens**-0.5
        ones = states.new_ones(1, int(states.shape[1]))
        states = states * self.shrink
        total = (ones @ states).transpose(1, 2)
        by_key = keep_axes(self.key.weight @ (states.transpose(1, 2) @ states), 1, self.groups, size, channels)
        query_total = keep_axes(self.query.weight @ total, 1, self.groups, size, 1)
        key_total = keep_axes(self.key.weight @ total, 1, self.groups, 1, size)
        key_bias = self.key.bias.reshape(self.groups, 1, size)
        factor = scale / self.shrink
        scores: Tensor = (self._by_group(self.query.weight) @ by_key.transpose(2, 3)) * (factor / self.shrink)
        scores = scores + (query_total * factor) * key_bias
        return scores + self._by_group(self.query.bias) * (key_total * factor + key_bias * (self.num_tokens * scale))


def _split_projections(source: Any) -> list[nn.Linear]:
    """The projections of queries, keys and values, which a checkpoint has as one layer."""
    pairs = zip(source.qkv.weight.chunk(3), source.qkv.bias.chunk(3), strict=True)
    return [with_scale(weight, bias, 1.0) for weight, bias in pairs]


def channel_attention(source: Any, num_tokens: int, *, is_shared: bool = False) -> nn.Module:
    """Chooses the cheaper form: `ChannelAttention` saves two products of N·C² operations and adds two of C³.

    Args:
        source: The module of transformers.
        num_tokens: N.
        is_shared: Whether encoders of other image sizes share the weights, which then must not depend on N.
    """
    forms: tuple[type[nn.Module], type[nn.Module]] = (DirectChannelAttention, ChannelAttention)
    if is_shared:
        forms = (SharedDirectChannelAttention, SharedChannelAttention)
    return forms[source.proj.weight.shape[0] < num_tokens](source, num_tokens)


class _Block(nn.Module):
    """One DaViT block of either kind: x + conv1(x); x + attention(norm1(x)); x + conv2(x); x + mlp(norm2(x))."""

    def __init__(self, source: Any, attention: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv1 = with_residual(source.conv1)
        self.conv2 = with_residual(source.conv2)
        self.norm1: nn.LayerNorm = source.norm1
        self.norm2: nn.LayerNorm = source.norm2
        self.attention = attention
        self.ffn: nn.Module = source.ffn
        self.size = size

    def forward(self, states: Tensor) -> Tensor:
        states = _convolve(self.conv1, states, self.size)
        states = states + self.attention(self.norm1(states))
        states = _convolve(self.conv2, states, self.size)
        return states + _apply(self.ffn, self.norm2(states))


class VisionEncoder(nn.Module):
    """`pixel_values` `(B, 3, H, W)` to `image_features` `(B, N, D)`; the first token is the mean of the others."""

    def __init__(
        self, model: Florence2ForConditionalGeneration, image_size: tuple[int, int], *, is_shared: bool = False
    ) -> None:
        """Takes the weights over from a model.

        Args:
            model: The model; its weights are shared where they are not folded.
            image_size: `(width, height)` in pixels.
            is_shared: Whether encoders of other image sizes share the weights in a bundle.
        """
        super().__init__()
        tower: Any = model.model.vision_tower
        projector: Any = model.model.multi_modal_projector
        size = (image_size[1], image_size[0])
        layers: list[nn.Module] = []
        for stage, (conv, blocks) in enumerate(zip(tower.convs, tower.blocks, strict=True)):
            layers.append(_ConvEmbed(conv, size if stage else None))
            size = _convolved(conv.conv, size)
            for block in blocks:
                spatial, channel = block.spatial_block, block.channel_block
                layers.append(_Block(spatial, WindowAttention(spatial.window_attn, size), size))
                attention = channel_attention(channel.channel_attn, size[0] * size[1], is_shared=is_shared)
                layers.append(_Block(channel, attention, size))
        self.layers = nn.Sequential(*layers)
        self.projection: nn.Linear = projector.image_projection
        self.norm: nn.LayerNorm = projector.image_proj_norm
        self.register_buffer("positions", _position_table(projector, size), persistent=False)
        self.num_image_tokens = size[0] * size[1] + 1

    def forward(self, pixel_values: Tensor) -> Tensor:
        states = self.layers(pixel_values) + self.positions
        tokens = torch.cat([states.mean(1, keepdim=True), states], dim=1)
        features: Tensor = self.norm(self.projection(tokens))
        return features


def _convolved(conv: Any, size: tuple[int, int]) -> tuple[int, int]:
    height, width = (
        (length + 2 * padding - kernel) // stride + 1
        for length, padding, kernel, stride in zip(size, conv.padding, conv.kernel_size, conv.stride, strict=True)
    )
    return height, width


def _position_table(projector: Any, size: tuple[int, int]) -> Tensor:
    """Returns the position embedding `(H·W, C)`: column and row embeddings concatenated, plus that of frame 0.

    Florence-2 has a temporal embedding for videos; an image is a video of one frame.
    """
    height, width = size
    embed = projector.image_position_embed
    columns = embed.column_embeddings.weight[:width].expand(height, -1, -1)
    rows = embed.row_embeddings.weight[:height, None].expand(-1, width, -1)
    frame = projector.visual_temporal_embed.pos_idx_to_embed[0]
    return (torch.cat([columns, rows], dim=-1).flatten(0, 1) + frame).detach()
