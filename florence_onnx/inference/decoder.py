"""The text encoder and decoder with all tensors on the host: prefill, decode steps and the KV cache.

`TextModel` runs this project's own pair of graphs; `transformers_js.TransformersJsTextModel` does the same for the
layout of transformers.js.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.generate import DecoderSession
from florence_onnx.inference.decoder_inputs import (
    Bools,
    DecoderInputs,
    Ids,
    Slots,
    causal_mask,
    input_fields,
    token_positions,
)
from florence_onnx.runtime.engine import Binding, Engine

Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

FIRST_CAPACITY = 64
"""Slots of a new self-attention cache, on the host and on a device."""


class TextBackend(Protocol):
    """The text graphs of one layout: encodes prompts and opens a decoder session for them."""

    def start(self, input_ids: Ids, attention_mask: Ids, image_features: Floats) -> DecoderSession:
        """Encodes prompts.

        Args:
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens, 0 for padding.
            image_features: `(P, N, D)`.
        """


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the decoder and its KV caches."""

    num_layers: int
    num_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int

    def key_value_names(self, prefix: str) -> list[str]:
        """Graph names of the keys and values of all layers: `past_key_values.0.key`, `past_key_values.0.value`, …"""
        return [f"{prefix}.{layer}.{part}" for layer in range(self.num_layers) for part in ("key", "value")]


def present_name(name: str) -> str:
    """The output that returns an updated cache, by the name of the input that takes it."""
    return name.replace("past_key_values", "present")


def full_attention_mask(attention_mask: Ids, num_image_tokens: int) -> Ids:
    """The encoder's attention mask `(P, N + T)`: the N image tokens come first and are always attended."""
    image = np.ones((len(attention_mask), num_image_tokens), dtype=np.int64)
    return np.concatenate([image, attention_mask], axis=1)


class TextModel:
    """`text_encoder.onnx` and `decoder.onnx`."""

    def __init__(self, text_encoder: Engine, decoder: Engine, shape: DecoderShape) -> None:
        self._text_encoder = text_encoder
        self._decoder = decoder
        self._shape = shape

    def start(self, input_ids: Ids, attention_mask: Ids, image_features: Floats) -> DecoderSession:
        # An int8 text encoder has one scale for the activations of the whole batch (DynamicQuantizeMatMul), so a prompt's
        # outputs depend, within rounding, on the prompts beside it. The int8 decoder has a scale for each row.
        cross = self._text_encoder.run(
            {"input_ids": input_ids, "attention_mask": attention_mask, "image_features": image_features}
        )
        mask = full_attention_mask(attention_mask, image_features.shape[1])
        return CachedDecoder(self._decoder, self._shape, cross | {"encoder_attention_mask": mask})


class CachedDecoder:
    """A decoder session whose self KV cache is written in place and never reordered.

    A prompt has one cache of C slots for all its rows (beams). A call writes its new tokens to the next free slots, the
    same slot numbers for all prompts, and a mask says which slots each row attends. A row is therefore nothing but a
    set of slots: beams share the slots of their common history, reordering beams reorders rows of the mask, and a
    rejected draft token is a slot that no row attends. When the cache is full, the slots that no row attends any more
    are dropped; if that frees too few, the cache grows.

    Each cache array is bound as input and output of the graph. Arrays and bindings are replaced only when a prompt
    leaves, when the capacity changes, or for a number of tokens that was not fed before.
    """

    def __init__(self, engine: Engine, shape: DecoderShape, encoded: Mapping[str, Array]) -> None:
        """Args:
        engine: `decoder.onnx`.
        shape: Sizes of the decoder.
        encoded: Cross KV and `encoder_attention_mask`, by the names of the decoder's inputs.
        """
        self._engine = engine
        self._shape = shape
        self._encoded = {
            name: np.ascontiguousarray(array, dtype=engine.inputs[name]) for name, array in encoded.items()
        }
        self._caches: dict[str, Array] = {}
        self._calls: dict[int, _Call] = {}
        prompts = len(self._encoded["encoder_attention_mask"])
        self._visible: Bools = np.zeros((prompts, 1, 0), dtype=np.bool_)  # (P, K, C)
        self._lengths: Ids = np.zeros((prompts, 1), dtype=np.int64)  # (P, K)
        self._num_slots = 0
        self._last_call: _Call | None = None

    def step(self, token_ids: Ids) -> Floats:
        return self.verify(token_ids)[:, -1]

    def verify(self, token_ids: Ids) -> Floats:
        rows, num_tokens = token_ids.shape
        prompts, num_rows, _ = self._visible.shape
        assert rows == prompts * num_rows, f"{rows} rows for {num_rows} of each of {prompts} prompts"
        first = self._reserve(num_rows * num_tokens)
        call = self._call(num_rows, num_tokens)
        call.prepare(token_ids, self._lengths, self._visible, first, self._shape.max_positions)
        call.binding.run()
        self._visible[..., first : self._num_slots] = call.causal[:, -1]
        self._lengths += num_tokens
        self._last_call = call
        return call.logits.reshape(rows, num_tokens, self._shape.vocab_size)

    def keep(self, counts: Ids) -> None:
        call = self._last_call
        assert call is not None, "nothing was verified"
        num_rows, num_tokens, total = call.causal.shape
        first = self._num_slots - total
        kept = counts.reshape(-1, num_rows)
        # What a row attends after its k-th new token is row k - 1 of the causal mask: the rejected ones drop out.
        self._visible[..., first : self._num_slots] = call.causal[np.arange(num_rows), kept - 1]
        self._lengths += kept - num_tokens
        used = np.flatnonzero(self._visible[..., first : self._num_slots].any(axis=(0, 1)))
        self._num_slots = first + int(used[-1]) + 1

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        old_prompts, old_num_rows, capacity = self._visible.shape
        if len(prompts) != old_prompts:
            self._encoded = {name: array[prompts] for name, array in self._encoded.items()}
            self._caches = {name: cache[prompts] for name, cache in self._caches.items()}
            self._calls = {}
        num_rows = len(rows) // len(prompts)
        if num_rows == old_num_rows == 1 and len(prompts) == old_prompts:
            return  # one row of each prompt, and prompts stay in order: nothing is reordered
        self._visible = self._visible.reshape(-1, capacity)[rows].reshape(len(prompts), num_rows, capacity)
        self._lengths = self._lengths.reshape(-1)[rows].reshape(len(prompts), num_rows)

    def _call(self, num_rows: int, num_tokens: int) -> _Call:
        total = num_rows * num_tokens
        call = self._calls.get(total)
        if call is None or call.causal.shape != (num_rows, num_tokens, total):
            call = self._calls[total] = _Call(self._engine, self._visible.shape, num_tokens, self._shape.vocab_size)
            call.bind(self._encoded, self._caches)
        return call

    def _reserve(self, count: int) -> int:
        """Takes the next `count` slots and returns the first; makes room where there are too few."""
        if self._num_slots + count > self._visible.shape[2]:
            self._make_room(count)
        first = self._num_slots
        self._num_slots += count
        return first

    def _make_room(self, count: int) -> None:
        """Drops the slots that no row attends, and doubles the capacity until a quarter of it is free afterwards."""
        live = [np.flatnonzero(each.any(axis=0)) for each in self._visible]
        needed = max(map(len, live))
        old_capacity = self._visible.shape[2]
        capacity = max(old_capacity, FIRST_CAPACITY)
        # Without a quarter left free, a cache that is full of live slots would be compacted again at every token.
        while (needed + count) * 4 > capacity * 3:
            capacity *= 2
        if capacity != old_capacity:
            self._calls = {}
        for name in self._shape.key_value_names("past_key_values"):
            self._caches[name] = self._compact(self._caches.get(name), name, live, capacity)
        old, self._visible = self._visible, np.zeros((*self._visible.shape[:2], capacity), dtype=np.bool_)
        for prompt, slots in enumerate(live):
            self._visible[prompt, :, : len(slots)] = old[prompt][:, slots]
        self._num_slots = needed

    def _compact(self, cache: Array | None, name: str, live: Sequence[Slots], capacity: int) -> Array:
        """Moves the live slots of each prompt to the front, in place unless the capacity changes."""
        shape = self._shape
        sizes = (len(live), shape.num_heads, capacity, shape.head_dim)
        if cache is None:
            return np.zeros(sizes, dtype=self._engine.inputs[name])
        target = cache if cache.shape == sizes else np.zeros(sizes, dtype=cache.dtype)
        for prompt, slots in enumerate(live):
            target[prompt, :, : len(slots)] = cache[prompt][:, slots]
        return target


class _Call:
    """The buffers and the binding for decoder calls of one shape."""

    def __init__(self, engine: Engine, visible_shape: tuple[int, ...], num_tokens: int, vocab_size: int) -> None:
        """Args:
        engine: `decoder.onnx`.
        visible_shape: `(P, K, C)`: prompts, rows of each, capacity.
        num_tokens: n, new tokens of each row; the graph takes S = K·n a prompt.
        vocab_size: V.
        """
        prompts, num_rows, capacity = visible_shape
        total = num_rows * num_tokens
        self._sizes = (prompts, num_rows, num_tokens)
        fields = input_fields(prompts, total, capacity)
        self._inputs = DecoderInputs(**{name: np.zeros(shape, dtype) for name, (shape, dtype) in fields.items()})
        self.causal = causal_mask(num_rows, num_tokens).reshape(num_rows, num_tokens, total)
        self.logits: Floats = np.zeros((prompts, total, vocab_size), dtype=np.float32)
        self.binding: Binding = engine.bind()

    def bind(self, encoded: Mapping[str, Array], caches: Mapping[str, Array]) -> None:
        """Binds all buffers to the graph's inputs and outputs."""
        binding = self.binding
        for name, array in (*vars(self._inputs).items(), *encoded.items(), *caches.items()):
            binding.bind_input(name, array)
        for name, cache in caches.items():
            binding.bind_output(present_name(name), cache)
        binding.bind_output("logits", self.logits)

    def prepare(self, token_ids: Ids, lengths: Ids, visible: Bools, first: int, max_positions: int) -> None:
        """Fills the inputs of the next run.

        Args:
            token_ids: `(P·K, n)`.
            lengths: `(P, K)`, how many tokens each row has already.
            visible: `(P, K, C)`, the slots that hold them.
            first: The first slot to write to.
            max_positions: Of the model.
        """
        inputs = self._inputs
        total = inputs.slots.shape[1]
        inputs.input_ids[:] = token_ids.reshape(inputs.input_ids.shape)
        positions = token_positions(lengths, self._sizes[-1], max_positions)
        inputs.positions[:] = positions.reshape(inputs.positions.shape)
        inputs.slots[:] = np.arange(first, first + total)
        masks = inputs.visible.reshape(*self._sizes, -1)
        masks[:] = visible[:, :, None]
        masks[..., first : first + total] |= self.causal
