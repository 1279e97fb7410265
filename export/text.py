"""The text encoder and the decoder as torch modules, written for export: caches as arguments, no control flow.

They borrow the weights of a transformers `Florence2ForConditionalGeneration` and compute what its modules compute.
Shapes use P prompts, R decoder rows (beams of one prompt adjacent), T prompt tokens, N image tokens,
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


def merge_heads(states: Tensor) -> Tensor:
    """`(A, H, B, d)` to `(A, B, H·d)`."""
    return states.transpose(1, 2).flatten(2)


def _masking_bias(visible: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere, to be added to attention scores."""
    return torch.where(visible, 0.0, float("-inf"))


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Args: query `(A, H, B, d)`, scaled; key `(A, H, d, L)`; value `(A, H, L, d)`; bias broadcastable to `(A, H, B, L)`."""
    return merge_heads((query @ key + bias).softmax(-1) @ value)


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
