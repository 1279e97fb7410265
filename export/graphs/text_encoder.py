"""The text encoder as a torch module, written for export: no control flow, and the decoder's cross KV as outputs.

It borrows the weights of a transformers `Florence2ForConditionalGeneration` and computes what its modules compute.
Shapes use P prompts, T prompt tokens, N image tokens, E = N + T encoder positions, H heads, d head size, D = H·d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

from .attention import POSITION_OFFSET, Projection, attend, masking_bias, merge_heads, split_heads


class TextEncoder(nn.Module):
    """Prompts and image features to the cross KV of every decoder layer.

    Inputs: `input_ids` and `attention_mask` `(P, T)` int64, `image_features` `(P, N, D)`. Outputs: per decoder layer
    the cross key `(P, H, d, E)` and value `(P, H, E, d)`. The keys are transposed once here, in the layout of the right
    factor of `query @ key`, and not in every decode step.
    """

    def __init__(self, model: Florence2ForConditionalGeneration, *, is_sized: bool = True) -> None:
        """Args:
        model: The model, whose weights are shared.
        is_sized: Whether N is fixed, as it is with a single image size.
        """
        super().__init__()
        bart = model.model.language_model
        self.encoder: Any = bart.encoder
        self.cross = nn.ModuleList(layer.encoder_attn for layer in bart.decoder.layers)
        self.queries = nn.ModuleList(
            Projection(layer.self_attn.q_proj, scales=(layer.self_attn.scaling,)) for layer in bart.encoder.layers
        )
        self.is_sized = is_sized
        self.embed_scale = float(getattr(bart.encoder.embed_tokens, "embed_scale", 1.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        text = functional.embedding(input_ids, encoder.embed_tokens.weight) * self.embed_scale
        states = torch.cat([image_features, text], dim=1)
        positions = encoder.embed_positions.weight[POSITION_OFFSET : POSITION_OFFSET + states.shape[1]]
        states = encoder.layernorm_embedding(states + positions)
        # Image tokens are always attended to: 0 on the left. The bias is padded and not the mask, because the CUDA
        # provider has no Pad for integers.
        num_image_tokens = image_features.shape[1]
        left = int(num_image_tokens) if self.is_sized else num_image_tokens
        bias = functional.pad(masking_bias(attention_mask[:, None, None, :] != 0), (left, 0))
        for layer, project_query in zip(encoder.layers, self.queries, strict=True):
            attended = self._attention(layer.self_attn, project_query, states, bias)
            states = layer.self_attn_layer_norm(states + attended)
            states = layer.final_layer_norm(states + layer.fc2(layer.activation_fn(layer.fc1(states))))
        return tuple(part for attention in self.cross for part in self._keys_values(attention, states))

    @staticmethod
    def _attention(attention: Any, project_query: nn.Module, states: Tensor, bias: Tensor) -> Tensor:
        query = split_heads(project_query(states), attention.num_heads)
        key, value = TextEncoder._keys_values(attention, states)
        attended: Tensor = attention.out_proj(merge_heads(attend(query, key, value, bias)))
        return attended

    @staticmethod
    def _keys_values(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        heads = attention.num_heads
        key = split_heads(attention.k_proj(states), heads).transpose(2, 3)
        return key, split_heads(attention.v_proj(states), heads)
