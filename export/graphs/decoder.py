"""The decoder as a torch module, written for export: no control flow, and the KV cache as inputs and outputs.

It borrows the weights of a transformers `Florence2ForConditionalGeneration` and computes what its modules compute.
Shapes use P prompts, E encoder positions, S new decoder tokens of a prompt, C slots of its cache, H heads, d head size, D = H·d.
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
    """`cache` `(P, H, C, d)` with `new` `(P, H, S, d)` at `places` `(P, H, S, 3)`: one `ScatterND`.

    It copies rows of d numbers, which `ScatterElements` writes one by one (fifteen times slower on ONNX Runtime's CPU
    provider), and writes in place where input and output are bound to one buffer. torch would export an indexed
    assignment as a dozen nodes a cache.
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
    """What all layers share in one call."""

    places: Tensor
    """`(P, H, S, 3)`, where the new tokens are written: prompt, head and slot."""
    bias: Tensor
    """`(P, 1, S, C)`, 0 for the slots that a token attends, -inf for the others."""
    cross_bias: Tensor
    """`(P, 1, 1, E)`, the same for the encoder's positions."""


def _places(slots: Tensor, heads: int) -> Tensor:
    """Args: slots `(P, S)`."""
    prompts, length = slots.shape
    sizes = prompts, heads, length
    axes = torch.arange(prompts)[:, None, None], torch.arange(heads)[:, None], slots[:, None]
    return torch.stack([axis.expand(sizes) for axis in axes], dim=-1)


class DecoderLayer(nn.Module):
    """One layer: what it computes is transformers', with the queries' scale inside the weights."""

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
        """Returns the states `(P, S, D)`, and the self keys and values with those of the new tokens."""
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
    """One decoder call: S new tokens of every prompt in, logits after each of them out, the cache written in place.

    Inputs: `input_ids` `(P, S)`; `positions` `(P, S)`, the place of each token in its answer; `slots` `(P, S)`, where in
    the cache each is written; `visible` `(P, S, C)` bool, which slots a token attends, its own among them;
    `encoder_attention_mask` `(P, E)`; per layer cross key `(P, H, d, E)` and value `(P, H, E, d)`, self key and value
    `(P, H, C, d)`. Outputs: `logits` `(P, S, V)` and the self keys and values in the same shapes.

    A prompt has one cache, whatever its number of beams: they lie side by side on the query axis of both attentions,
    and which history belongs to whom is a matter of `visible` alone. So are drafts that turn out wrong.
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
