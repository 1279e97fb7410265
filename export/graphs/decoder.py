"""The decoder as a torch module, written for export: no control flow, and the KV cache as inputs and outputs.

It borrows the weights of a transformers `Florence2ForConditionalGeneration` and computes what its modules compute.
Shapes use P prompts, E encoder positions, S new decoder tokens of a prompt, C slots of its cache, H heads, d head size,
D = H·d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

from .attention import POSITION_OFFSET, Projection, attend, masking_bias, merge_heads, split_heads


class _WriteSlots(torch.autograd.Function):
    """Writes `new` `(P, H, S, d)` to `cache` `(P, H, C, d)` at `places` `(P, H, S, 3)`, as one `ScatterND`.

    `ScatterND` copies rows of d numbers; `ScatterElements` writes number by number, fifteen times slower on ONNX
    Runtime's CPU provider. It writes in place if input and output are bound to the same buffer. torch would export an
    indexed assignment as a dozen nodes for each cache.
    """

    @staticmethod
    def forward(ctx: Any, cache: Tensor, places: Tensor, new: Tensor) -> Tensor:
        prompts, heads, slots = places.unbind(-1)
        return cache.index_put((prompts, heads, slots), new)

    @staticmethod
    def symbolic(graph: Any, cache: Any, places: Any, new: Any) -> Any:
        return graph.op("ScatterND", cache, places, new).setType(cache.type())


# torch leaves `apply` untyped
_write_slots: Any = _WriteSlots.apply


@dataclass(frozen=True)
class _Slots:
    """Tensors of one decoder call that all layers share."""

    places: Tensor
    """`(P, H, S, 3)`: indices (prompt, head, slot) at which the new tokens' keys and values are written."""
    bias: Tensor
    """`(P, 1, S, C)`: 0 for the slots that a token attends to, -inf for the others."""
    cross_bias: Tensor
    """`(P, 1, 1, E)`: the same for the encoder positions."""


def _places(slots: Tensor, heads: int) -> Tensor:
    """Expands `slots` `(P, S)` to the indices `(P, H, S, 3)` of `ScatterND`."""
    prompts, length = slots.shape
    sizes = prompts, heads, length
    axes = torch.arange(prompts)[:, None, None], torch.arange(heads)[:, None], slots[:, None]
    return torch.stack([axis.expand(sizes) for axis in axes], dim=-1)


class DecoderLayer(nn.Module):
    """transformers' decoder layer with fused projections, and the scale folded into the query's weights."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer: Any = layer
        own, cross = layer.self_attn, layer.encoder_attn
        self.heads = int(own.num_heads)
        self.project = Projection(own.q_proj, own.k_proj, own.v_proj, scales=(own.scaling,))
        self.project_cross = Projection(cross.q_proj, scales=(cross.scaling,))

    def forward(
        self, states: Tensor, slots: _Slots, past: tuple[Tensor, ...], cross: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the states `(P, S, D)`, and the self key and value `(P, H, C, d)` with the new tokens written."""
        layer = self.layer
        query, new_key, new_value = split_heads(self.project(states), 3 * self.heads).split(self.heads, dim=1)
        key = _write_slots(past[0], slots.places, new_key)
        value = _write_slots(past[1], slots.places, new_value)
        attended = merge_heads(attend(query, key.transpose(2, 3), value, slots.bias))
        states = layer.self_attn_layer_norm(states + layer.self_attn.out_proj(attended))
        query = split_heads(self.project_cross(states), self.heads)
        attended = merge_heads(attend(query, cross[0], cross[1], slots.cross_bias))
        states = layer.encoder_attn_layer_norm(states + layer.encoder_attn.out_proj(attended))
        states = layer.final_layer_norm(states + layer.fc2(layer.activation_fn(layer.fc1(states))))
        return states, key, value


class Decoder(nn.Module):
    """One decoder call: S new tokens of every prompt to the logits after each of them, with the KV cache updated.

    Inputs:
        input_ids: `(P, S)` int64.
        positions: `(P, S)` int64, the position of each token in its answer.
        slots: `(P, S)` int64, the slot of the cache to which each token's key and value are written.
        visible: `(P, S, C)` bool, the slots that each token attends to; its own must be among them.
        encoder_attention_mask: `(P, E)` int64.
        cross KV: per layer key `(P, H, d, E)` and value `(P, H, E, d)`.
        self KV: per layer key and value `(P, H, C, d)`.

    Outputs: `logits` `(P, S, V)`, and per layer the self key and value in the shapes of the inputs.

    Prefill, decode steps, beams and drafts are the same graph. A prompt has one cache whatever its number of beams: the
    S axis holds the tokens of all beams, and `visible` alone says which slots are the history of which. Beams are so
    reordered, and rejected drafts dropped, without copying the cache.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        self.decoder: Any = model.model.language_model.decoder
        self.layers = nn.ModuleList(DecoderLayer(layer) for layer in self.decoder.layers)
        self.lm_head: nn.Linear = model.lm_head
        self.embed_scale = float(getattr(self.decoder.embed_tokens, "embed_scale", 1.0))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        visible: Tensor,
        encoder_attention_mask: Tensor,
        *caches: Tensor,
    ) -> tuple[Tensor, ...]:
        decoder, num_layers = self.decoder, len(self.layers)
        cross, past = caches[: 2 * num_layers], caches[2 * num_layers :]
        shared = _Slots(
            _places(slots, past[0].shape[1]),
            masking_bias(visible[:, None]),
            masking_bias(encoder_attention_mask[:, None, None, :] != 0),
        )
        states = functional.embedding(input_ids, decoder.embed_tokens.weight)
        if self.embed_scale != 1:
            states = states * self.embed_scale
        states = states + functional.embedding(positions, decoder.embed_positions.weight[POSITION_OFFSET:])
        states = decoder.layernorm_embedding(states)
        present: list[Tensor] = []
        for index, layer in enumerate(self.layers):
            pair = slice(2 * index, 2 * index + 2)
            states, key, value = layer(states, shared, past[pair], cross[pair])
            present += [key, value]
        return functional.linear(states, self.lm_head.weight), *present
