"""The three graphs as torch modules, written for export: static picture sizes, caches as arguments, no control flow.

They borrow the weights of a transformers `Florence2ForConditionalGeneration` and compute what its modules compute.
Shapes use B pictures, P prompts, R decoder rows (beams of one prompt adjacent), T prompt tokens, N image tokens,
E = N + T encoder positions, S new tokens, C cache capacity, H heads, d head size, D = H·d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

POSITION_OFFSET = 2
"""BART's position table starts two rows late (transformers, `BartLearnedPositionalEmbedding`)."""


def _split_heads(states: Tensor, num_heads: int) -> Tensor:
    """`(A, B, H·d)` to `(A, H, B, d)`."""
    return states.reshape(states.shape[0], states.shape[1], num_heads, -1).transpose(1, 2)


def _merge_heads(states: Tensor) -> Tensor:
    """`(A, H, B, d)` to `(A, B, H·d)`."""
    return states.transpose(1, 2).flatten(2)


# -------------------------------------------------------------------------------------------------------------- vision


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
        return self.proj(_merge_heads(scores.softmax(-1) @ value))


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


# ---------------------------------------------------------------------------------------------------------------- text


def _masking_bias(visible: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere, to be added to attention scores."""
    return torch.where(visible, 0.0, float("-inf"))


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Args: query `(A, H, B, d)`, scaled; key `(A, H, d, L)`; value `(A, H, L, d)`; bias broadcastable to `(A, H, B, L)`."""
    return _merge_heads((query @ key + bias).softmax(-1) @ value)


class TextEncoder(nn.Module):
    """Prompt and picture to the cross-attention keys and values of every decoder layer.

    `input_ids` and `attention_mask` `(P, T)`, `image_features` `(P, N, D)` to key `(P, H, d, E)` and value
    `(P, H, E, d)` of each layer. Keys are transposed, as the decoder's product reads them.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        bart = model.model.language_model
        self.encoder: Any = bart.encoder
        self.cross = nn.ModuleList(layer.encoder_attn for layer in bart.decoder.layers)
        self.embed_scale = float(getattr(bart.encoder.embed_tokens, "embed_scale", 1.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        text = functional.embedding(input_ids, encoder.embed_tokens.weight) * self.embed_scale
        states = torch.cat([image_features, text], dim=1)
        positions = encoder.embed_positions.weight[POSITION_OFFSET : POSITION_OFFSET + states.shape[1]]
        states = encoder.layernorm_embedding(states + positions)
        mask = functional.pad(attention_mask, (image_features.shape[1], 0), value=1)
        bias = _masking_bias(mask[:, None, None, :] != 0)
        for layer in encoder.layers:
            states = layer.self_attn_layer_norm(states + self._attention(layer.self_attn, states, bias))
            states = layer.final_layer_norm(states + layer.fc2(layer.activation_fn(layer.fc1(states))))
        return tuple(part for attention in self.cross for part in self._keys_values(attention, states))

    @staticmethod
    def _attention(attention: Any, states: Tensor, bias: Tensor) -> Tensor:
        query = _split_heads(attention.q_proj(states) * attention.scaling, attention.num_heads)
        key, value = TextEncoder._keys_values(attention, states)
        attended: Tensor = attention.out_proj(_attend(query, key, value, bias))
        return attended

    @staticmethod
    def _keys_values(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        heads = attention.num_heads
        key = _split_heads(attention.k_proj(states), heads).transpose(2, 3)
        return key, _split_heads(attention.v_proj(states), heads)


class Decoder(nn.Module):
    """One decoder call: new tokens in, logits after the last of them out, the cache written in place.

    Inputs: `input_ids` `(R, S)`; `past_lengths` `(R,)`, tokens already in each row's cache; `encoder_attention_mask`
    `(P, E)`; per layer cross key `(P, H, d, E)` and value `(P, H, E, d)`; per layer self key `(R, H, d, C)` and value
    `(R, H, C, d)`. Outputs: `logits` `(R, V)` and the self keys and values with S more tokens, in the same shapes.
    R is a multiple of P: the beams of a prompt are folded into the query axis of the cross-attention, so that its keys
    and values exist, and are read, once per prompt.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.decoder: Any = model.model.language_model.decoder
        self.lm_head: nn.Linear = model.lm_head
        self.embed_scale = float(getattr(self.decoder.embed_tokens, "embed_scale", 1.0))

    def forward(
        self, input_ids: Tensor, past_lengths: Tensor, encoder_attention_mask: Tensor, *caches: Tensor
    ) -> tuple[Tensor, ...]:
        decoder, num_layers = self.decoder, len(self.decoder.layers)
        cross, past = caches[: 2 * num_layers], caches[2 * num_layers :]
        positions = past_lengths[:, None] + torch.arange(input_ids.shape[1])
        states = functional.embedding(input_ids, decoder.embed_tokens.weight) * self.embed_scale
        states = states + functional.embedding(positions + POSITION_OFFSET, decoder.embed_positions.weight)
        states = decoder.layernorm_embedding(states)
        capacity = torch.arange(past[0].shape[3])
        bias = _masking_bias(capacity <= positions[:, None, :, None])
        cross_bias = _masking_bias(encoder_attention_mask[:, None, None, :] != 0)
        present: list[Tensor] = []
        for index, layer in enumerate(decoder.layers):
            cross_key, cross_value = cross[2 * index], cross[2 * index + 1]
            key, value = past[2 * index], past[2 * index + 1]
            key, value = self._extend(layer.self_attn, states, positions, key, value)
            present += [key, value]
            states = layer.self_attn_layer_norm(
                states + self._self_attention(layer.self_attn, states, key, value, bias)
            )
            attended = self._cross_attention(layer.encoder_attn, states, cross_key, cross_value, cross_bias)
            states = layer.encoder_attn_layer_norm(states + attended)
            states = layer.final_layer_norm(states + layer.fc2(layer.activation_fn(layer.fc1(states))))
        return functional.linear(states[:, -1], self.lm_head.weight), *present

    @staticmethod
    def _extend(attention: Any, states: Tensor, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the keys and values of the new tokens at their positions."""
        new_key = _split_heads(attention.k_proj(states), attention.num_heads).transpose(2, 3)
        new_value = _split_heads(attention.v_proj(states), attention.num_heads)
        key = key.scatter(3, positions[:, None, None, :].expand(new_key.shape), new_key)
        value = value.scatter(2, positions[:, None, :, None].expand(new_value.shape), new_value)
        return key, value

    @staticmethod
    def _self_attention(attention: Any, states: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        query = _split_heads(attention.q_proj(states) * attention.scaling, attention.num_heads)
        attended: Tensor = attention.out_proj(_attend(query, key, value, bias))
        return attended

    @staticmethod
    def _cross_attention(attention: Any, states: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        query = attention.q_proj(states) * attention.scaling
        folded = query.reshape(key.shape[0], -1, query.shape[-1])
        attended = _attend(_split_heads(folded, attention.num_heads), key, value, bias)
        projected: Tensor = attention.out_proj(attended.reshape(states.shape))
        return projected
