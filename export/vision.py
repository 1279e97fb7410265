"""The vision encoder as a torch module, written for export: static picture sizes, no control flow.

It borrows the weights of a transformers `Florence2ForConditionalGeneration` and computes what its modules compute.
Shapes use B pictures, N image tokens, C channels of a stage, D columns of the image features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

from .text import merge_heads


class _ConvEmbed(nn.Module):
    """Patches of a stage: tokens `(B, H·W, C)` to the next resolution's."""

    def __init__(self, source: Any, size: tuple[int, int] | None) -> None:
        super().__init__()
        self.conv: nn.Conv2d = source.conv
        self.norm: nn.LayerNorm = source.norm
        self.pre_norm: bool = source.pre_norm
        self.size = size

    def forward(self, states: Tensor) -> Tensor:
        if self.size is not None:
            states = self.norm(states) if self.pre_norm else states
            states = states.transpose(1, 2).unflatten(2, self.size)
        states = self.conv(states).flatten(2).transpose(1, 2)
        return states if self.pre_norm else self.norm(states)


class _WindowAttention(nn.Module):
    """Attention within windows of w x w tokens; windows beyond the edge are filled with zeros, which are attended."""

    def __init__(self, source: Any, size: tuple[int, int]) -> None:
        super().__init__()
        self.qkv: nn.Linear = source.qkv
        self.proj: nn.Linear = source.proj
        self.num_heads: int = source.num_heads
        self.scale: float = source.scale
        self.window: int = source.window_size
        self.size = size

    def forward(self, states: Tensor) -> Tensor:
        (height, width), window, channels = self.size, self.window, states.shape[-1]
        right, bottom = -width % window, -height % window
        rows, columns = (height + bottom) // window, (width + right) // window
        grid = states.unflatten(1, (height, width))
        if right or bottom:
            grid = functional.pad(grid, (0, 0, 0, right, 0, bottom))
        windows = grid.reshape(-1, rows, window, columns, window, channels).transpose(2, 3)
        attended = self._attend(windows.reshape(-1, window * window, channels))
        grid = attended.reshape(-1, rows, columns, window, window, channels).transpose(2, 3)
        grid = grid.reshape(-1, rows * window, columns * window, channels)[:, :height, :width]
        return grid.flatten(1, 2)

    def _attend(self, windows: Tensor) -> Tensor:
        qkv = self.qkv(windows).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query * self.scale) @ key.transpose(2, 3)
        return self.proj(merge_heads(scores.softmax(-1) @ value))


class _ChannelAttention(nn.Module):
    """Attention of channels to channels within groups, over all tokens."""

    def __init__(self, source: Any, num_tokens: int) -> None:
        super().__init__()
        self.qkv: nn.Linear = source.qkv
        self.proj: nn.Linear = source.proj
        self.groups: int = source.groups
        self.scale = num_tokens**-0.5

    def forward(self, states: Tensor) -> Tensor:
        qkv = self.qkv(states).unflatten(2, (3, self.groups, -1)).permute(2, 0, 3, 4, 1)
        query, key, value = qkv.unbind(0)
        scores = (query * self.scale) @ key.transpose(2, 3)
        return self.proj((scores.softmax(-1) @ value).flatten(1, 2).transpose(1, 2))


class _Block(nn.Module):
    """x + conv(x); x + attention(norm(x)); x + conv(x); x + mlp(norm(x))."""

    def __init__(self, source: Any, attention: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv1: nn.Conv2d = source.conv1
        self.conv2: nn.Conv2d = source.conv2
        self.norm1: nn.LayerNorm = source.norm1
        self.norm2: nn.LayerNorm = source.norm2
        self.attention = attention
        self.ffn: nn.Module = source.ffn
        self.size = size

    def forward(self, states: Tensor) -> Tensor:
        states = self._mix(self.conv1, states)
        states = states + self.attention(self.norm1(states))
        states = self._mix(self.conv2, states)
        mixed: Tensor = states + self.ffn(self.norm2(states))
        return mixed

    def _mix(self, conv: nn.Conv2d, states: Tensor) -> Tensor:
        return states + conv(states.transpose(1, 2).unflatten(2, self.size)).flatten(2).transpose(1, 2)


class VisionEncoder(nn.Module):
    """`pixel_values` `(B, 3, height, width)` to `image_features` `(B, N, D)`."""

    def __init__(self, model: Florence2ForConditionalGeneration, image_size: tuple[int, int]) -> None:
        """Args:
        model: Where the weights come from.
        image_size: `(width, height)` in pixels.
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
                layers.append(_Block(spatial, _WindowAttention(spatial.window_attn, size), size))
                layers.append(_Block(channel, _ChannelAttention(channel.channel_attn, size[0] * size[1]), size))
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
    """Learned column and row embeddings side by side, plus the embedding of the first (only) frame: `(H·W, C)`."""
    height, width = size
    embed = projector.image_position_embed
    columns = embed.column_embeddings.weight[:width].expand(height, -1, -1)
    rows = embed.row_embeddings.weight[:height, None].expand(-1, width, -1)
    frame = projector.visual_temporal_embed.pos_idx_to_embed[0]
    return (torch.cat([columns, rows], dim=-1).flatten(0, 1) + frame).detach()
