"""The torch modules of the transformers.js layout. The vision encoder is that of `graphs`, which both layouts share.

Shapes use B rows, S new tokens, P past tokens, E encoder positions, H heads, d head size, D = H·d, V vocabulary rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

from ..graphs.attention import POSITION_OFFSET


class EmbedTokens(nn.Module):
    """`input_ids` `(B, S)` to `inputs_embeds` `(B, S, D)`."""

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.embedding = model.model.language_model.shared

    def forward(self, input_ids: Tensor) -> Tensor:
        embeds: Tensor = self.embedding(input_ids)
        return embeds


class Encoder(nn.Module):
    """`attention_mask` `(B, E)` and `inputs_embeds` `(B, E, D)` to `last_hidden_state` `(B, E, D)`."""

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.encoder = model.model.language_model.encoder

    def forward(self, attention_mask: Tensor, inputs_embeds: Tensor) -> Tensor:
        states = _positioned(self.encoder, inputs_embeds, 0)
        bias = _bias(attention_mask[:, None, None, :] != 0)
        for layer in self.encoder.layers:
            key, value = _keys_values(layer.self_attn, states)
            states = layer.self_attn_layer_norm(states + _attention(layer.self_attn, states, key, value, bias))
            states = _feed_forward(layer, states)
        return states


class FirstDecoder(nn.Module):
    """The decoder without a cache.

    Inputs: `encoder_attention_mask` `(B, E)`, `encoder_hidden_states` `(B, E, D)`, `inputs_embeds` `(B, S, D)`.
    Outputs: `logits` `(B, S, V)`, and per layer self key, self value `(B, H, S, d)`, cross key, cross value
    `(B, H, E, d)`.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.lm_head = model.model.language_model.decoder, model.lm_head

    def forward(
        self, encoder_attention_mask: Tensor, encoder_hidden_states: Tensor, inputs_embeds: Tensor
    ) -> tuple[Tensor, ...]:
        states = _positioned(self.decoder, inputs_embeds, 0)
        cross_bias = _bias(encoder_attention_mask[:, None, None, :] != 0)
        bias = _causal_bias(inputs_embeds.shape[1], 0)
        present: list[Tensor] = []
        for layer in self.decoder.layers:
            own = _keys_values(layer.self_attn, states)
            cross = _keys_values(layer.encoder_attn, encoder_hidden_states)
            states = _decoder_layer(layer, states, own, bias, cross, cross_bias)
            present += [*own, *cross]
        return self.lm_head(states), *present


class NextDecoder(nn.Module):
    """The decoder with a cache.

    Inputs: `encoder_attention_mask` `(B, E)`, `inputs_embeds` `(B, S, D)`, and per layer self key, self value
    `(B, H, P, d)`, cross key, cross value `(B, H, E, d)`. Outputs: `logits` `(B, S, V)`, and per layer self key, self
    value `(B, H, P + S, d)`. The cross KV is not returned: the caller has it, and in fp16 ONNX Runtime rejects a branch
    whose output is one of its inputs.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.lm_head = model.model.language_model.decoder, model.lm_head

    def forward(self, encoder_attention_mask: Tensor, inputs_embeds: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        past_length = past[0].shape[2]
        states = _positioned(self.decoder, inputs_embeds, past_length)
        cross_bias = _bias(encoder_attention_mask[:, None, None, :] != 0)
        bias = _causal_bias(inputs_embeds.shape[1], past_length)
        present: list[Tensor] = []
        for index, layer in enumerate(self.decoder.layers):
            past_key, past_value, *cross = past[4 * index : 4 * index + 4]
            new_key, new_value = _keys_values(layer.self_attn, states)
            own = torch.cat([past_key, new_key], dim=2), torch.cat([past_value, new_value], dim=2)
            states = _decoder_layer(layer, states, own, bias, (cross[0], cross[1]), cross_bias)
            present += own
        return self.lm_head(states), *present


def _decoder_layer(
    layer: Any,
    states: Tensor,
    own: tuple[Tensor, Tensor],
    bias: Tensor,
    cross: tuple[Tensor, Tensor],
    cross_bias: Tensor,
) -> Tensor:
    states = layer.self_attn_layer_norm(states + _attention(layer.self_attn, states, *own, bias))
    attended = _attention(layer.encoder_attn, states, *cross, cross_bias)
    return _feed_forward(layer, layer.encoder_attn_layer_norm(states + attended))


def _positioned(side: Any, embeds: Tensor, start: int) -> Tensor:
    """Adds the positions from `start` on to token embeddings, and normalises: `(B, S, D)`."""
    positions = torch.arange(embeds.shape[1]) + start + POSITION_OFFSET
    states: Tensor = side.layernorm_embedding(embeds + functional.embedding(positions, side.embed_positions.weight))
    return states


def _bias(visible: Tensor) -> Tensor:
    """Returns the bias of attention scores: 0 where visible, -inf elsewhere."""
    return torch.where(visible, 0.0, float("-inf"))


def _causal_bias(length: int, past_length: int) -> Tensor:
    """Returns the causal bias `(S, P + S)`: a new token attends to past tokens, and to new ones up to itself."""
    rows = torch.arange(length)[:, None] + past_length
    return _bias(torch.arange(length + past_length)[None, :] <= rows)


def _keys_values(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    """Returns key and value, each `(B, H, length, d)`."""
    return _split_heads(attention, attention.k_proj(states)), _split_heads(attention, attention.v_proj(states))


def _split_heads(attention: Any, states: Tensor) -> Tensor:
    return states.unflatten(2, (attention.num_heads, -1)).transpose(1, 2)


def _attention(attention: Any, states: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    query = _split_heads(attention, attention.q_proj(states) * attention.scaling)
    weights = (query @ key.transpose(2, 3) + bias).softmax(-1)
    attended: Tensor = attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
    return attended


def _feed_forward(layer: Any, states: Tensor) -> Tensor:
    mixed: Tensor = layer.final_layer_norm(states + layer.fc2(layer.activation_fn(layer.fc1(states))))
    return mixed
