"""The text encoder and the decoder as torch modules, written for export: caches as arguments, no control flow.

They borrow the weights of a transformers `Florence2ForConditionalGeneration` and compute what its modules compute.
Shapes use P prompts, T prompt tokens, N image tokens, E = N + T encoder positions, S new decoder tokens of a prompt,
C slots of its cache, H heads, d head size, D = H·d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Florence2ForConditionalGeneration

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


def split_heads(states: Tensor, num_heads: int) -> Tensor:
    """`(A, B, H·d)` to `(A, H, B, d)`."""
    split: Tensor = keep_axes(states, 2, num_heads, int(states.shape[-1]) // num_heads)
    return split.transpose(1, 2)


def merge_heads(states: Tensor) -> Tensor:
    """`(A, H, B, d)` to `(A, B, H·d)`."""
    merged: Tensor = keep_axes(states.transpose(1, 2), 2, int(states.shape[1]) * int(states.shape[3]))
    return merged


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
keep_axes: Any = _KeepAxes.apply
_write_slots: Any = _WriteSlots.apply


def _masking_bias(visible: Tensor) -> Tensor:
    """0 where visible, -inf elsewhere, to be added to attention scores."""
    return torch.where(visible, 0.0, float("-inf"))


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Args: query `(A, H, B, d)`, scaled; key `(A, H, d, L)`; value `(A, H, L, d)`; bias broadcastable to `(A, H, B, L)`."""
    return (query @ key + bias).softmax(-1) @ value


class _Projection(nn.Module):
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


class TextEncoder(nn.Module):
    """Prompt and image to the cross-attention keys and values of every decoder layer.

    `input_ids` and `attention_mask` `(P, T)`, `image_features` `(P, N, D)` to key `(P, H, d, E)` and value
    `(P, H, E, d)` of each layer. Keys are transposed, as the decoder's product reads them.
    """

    def __init__(self, model: Florence2ForConditionalGeneration) -> None:
        super().__init__()
        bart = model.model.language_model
        self.encoder: Any = bart.encoder
        self.cross = nn.ModuleList(layer.encoder_attn for layer in bart.decoder.layers)
        self.queries = nn.ModuleList(
            _Projection(layer.self_attn.q_proj, scales=(layer.self_attn.scaling,)) for layer in bart.encoder.layers
        )
        self.embed_scale = float(getattr(bart.encoder.embed_tokens, "embed_scale", 1.0))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_features: Tensor) -> tuple[Tensor, ...]:
        encoder = self.encoder
        text = functional.embedding(input_ids, encoder.embed_tokens.weight) * self.embed_scale
        states = torch.cat([image_features, text], dim=1)
        positions = encoder.embed_positions.weight[POSITION_OFFSET : POSITION_OFFSET + states.shape[1]]
        states = encoder.layernorm_embedding(states + positions)
        # Fractions are padded and not the mask: the CUDA provider has no Pad of integers. The number of image tokens is fixed.
        bias = functional.pad(_masking_bias(attention_mask[:, None, None, :] != 0), (int(image_features.shape[1]), 0))
        for layer, project_query in zip(encoder.layers, self.queries, strict=True):
            attended = self._attention(layer.self_attn, project_query, states, bias)
            states = layer.self_attn_layer_norm(states + attended)
            states = layer.final_layer_norm(states + layer.fc2(layer.activation_fn(layer.fc1(states))))
        return tuple(part for attention in self.cross for part in self._keys_values(attention, states))

    @staticmethod
    def _attention(attention: Any, project_query: nn.Module, states: Tensor, bias: Tensor) -> Tensor:
        query = split_heads(project_query(states), attention.num_heads)
        key, value = TextEncoder._keys_values(attention, states)
        attended: Tensor = attention.out_proj(merge_heads(_attend(query, key, value, bias)))
        return attended

    @staticmethod
    def _keys_values(attention: Any, states: Tensor) -> tuple[Tensor, Tensor]:
        heads = attention.num_heads
        key = split_heads(attention.k_proj(states), heads).transpose(2, 3)
        return key, split_heads(attention.v_proj(states), heads)


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
        self.project = _Projection(own.q_proj, own.k_proj, own.v_proj, scales=(own.scaling,))
        self.project_cross = _Projection(cross.q_proj, scales=(cross.scaling,))

    def forward(
        self, states: Tensor, slots: _Slots, past: tuple[Tensor, ...], cross: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the states `(P, S, D)`, and the self keys and values with those of the new tokens."""
        layer = self.layer
        query, new_key, new_value = split_heads(self.project(states), 3 * self.heads).split(self.heads, dim=1)
        key = _write_slots(past[0], slots.places, new_key)
        value = _write_slots(past[1], slots.places, new_value)
        attended = merge_heads(_attend(query, key.transpose(2, 3), value, slots.bias))
        states = layer.self_attn_layer_norm(states + layer.self_attn.out_proj(attended))
        query = split_heads(self.project_cross(states), self.heads)
        attended = merge_heads(_attend(query, cross[0], cross[1], slots.cross_bias))
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
            _masking_bias(visible[:, None]),
            _masking_bias(encoder_attention_mask[:, None, None, :] != 0),
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
