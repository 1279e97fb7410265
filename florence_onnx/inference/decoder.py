"""The text encoder and decoder over engines: encoding prompts, decode steps, and the KV cache.

`TextModel` is this project's own pair of graphs; the layout of transformers.js has its own class with the same two
methods in `transformers_js.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.generate import DecoderSession
from florence_onnx.runtime.engine import Binding, Engine

Ids = npt.NDArray[np.int64]
Slots = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

FIRST_CAPACITY = 64
"""Slots of a new cache; it doubles as long as needed."""


class TextBackend(Protocol):
    """What turns prompts and image features into a decoder session."""

    def start(self, input_ids: Ids, attention_mask: Ids, image_features: Floats) -> DecoderSession:
        """Encodes prompts.

        Args:
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens.
            image_features: `(P, N, D)`.
        """


@dataclass(frozen=True)
class DecoderShape:
    """Sizes of the self-attention cache."""

    num_layers: int
    num_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int


def full_attention_mask(attention_mask: Ids, num_image_tokens: int) -> Ids:
    """The encoder's mask `(P, N + T)`: the image tokens come first and are always attended."""
    image = np.ones((len(attention_mask), num_image_tokens), dtype=np.int64)
    return np.concatenate([image, attention_mask], axis=1)


class TextModel:
    """`text_encoder.onnx` and `decoder.onnx`."""

    def __init__(self, text_encoder: Engine, decoder: Engine, shape: DecoderShape) -> None:
        self._text_encoder = text_encoder
        self._decoder = decoder
        self._shape = shape

    def start(self, input_ids: Ids, attention_mask: Ids, image_features: Floats) -> DecoderSession:
        cross = self._text_encoder.run(
            {"input_ids": input_ids, "attention_mask": attention_mask, "image_features": image_features}
        )
        mask = full_attention_mask(attention_mask, image_features.shape[1])
        return CachedDecoder(self._decoder, self._shape, cross | {"encoder_attention_mask": mask})


class CachedDecoder:
    """A decoder session whose self-attention cache is written in place and never reordered.

    A prompt has one cache of C slots for all its rows (beams). A call writes its new tokens into the next free slots,
    the same for all prompts, and a mask says which slots each of them attends. A row is therefore nothing but a set of
    slots: beams share the history that they have in common, another order of beams is another order of the mask's
    rows, and a draft that was wrong is a slot that nobody attends. When the cache is full, the slots that no row
    attends any more are dropped, and if that is not enough the cache grows.

    The cache arrays are graph input and output at once. They and the bindings are replaced only when a prompt leaves,
    the capacity changes, or a number of tokens is fed for the first time.
    """

    def __init__(self, engine: Engine, shape: DecoderShape, encoded: Mapping[str, Array]) -> None:
        """Args:
        engine: `decoder.onnx`.
        shape: Sizes of the cache.
        encoded: Cross keys and values and `encoder_attention_mask`, by the decoder's input names.
        """
        self._engine = engine
        self._shape = shape
        self._encoded = {
            name: np.ascontiguousarray(array, dtype=engine.inputs[name]) for name, array in encoded.items()
        }
        self._caches: dict[str, Array] = {}
        self._calls: dict[int, _Call] = {}
        prompts = len(self._encoded["encoder_attention_mask"])
        self._visible: Bools = np.zeros((prompts, 1, 0), dtype=np.bool_)  # (prompts, rows of each, capacity)
        self._lengths: Ids = np.zeros((prompts, 1), dtype=np.int64)
        self._num_slots = 0
        self._last_call: _Call | None = None

    def step(self, token_ids: Ids) -> Floats:
        return self.verify(token_ids)[:, -1]

    def verify(self, token_ids: Ids) -> Floats:
        rows, num_tokens = token_ids.shape
        prompts, width, _ = self._visible.shape
        assert rows == prompts * width, f"{rows} rows for {width} of each of {prompts} prompts"
        first = self._reserve(width * num_tokens)
        call = self._call(width, num_tokens)
        call.prepare(token_ids, self._lengths, self._visible, first, self._shape.max_positions)
        call.binding.run()
        self._visible[..., first : self._num_slots] = call.own[:, -1]
        self._lengths += num_tokens
        self._last_call = call
        return call.logits.reshape(rows, num_tokens, self._shape.vocab_size)

    def keep(self, counts: Ids) -> None:
        call = self._last_call
        assert call is not None, "nothing was verified"
        width, num_tokens, total = call.own.shape
        first = self._num_slots - total
        kept = counts.reshape(-1, width)
        self._visible[..., first : self._num_slots] = call.own[np.arange(width), kept - 1]
        self._lengths += kept - num_tokens
        used = np.flatnonzero(self._visible[..., first : self._num_slots].any(axis=(0, 1)))
        self._num_slots = first + int(used[-1]) + 1

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        old_prompts, old_width, capacity = self._visible.shape
        if len(prompts) != old_prompts:
            self._encoded = {name: array[prompts] for name, array in self._encoded.items()}
            self._caches = {name: cache[prompts] for name, cache in self._caches.items()}
            self._calls = {}
        width = len(rows) // len(prompts)
        if width == old_width == 1 and len(prompts) == old_prompts:
            return  # rows of one prompt are adjacent, so this is no reordering
        self._visible = self._visible.reshape(-1, capacity)[rows].reshape(len(prompts), width, capacity)
        self._lengths = self._lengths.reshape(-1)[rows].reshape(len(prompts), width)

    def _call(self, width: int, num_tokens: int) -> _Call:
        total = width * num_tokens
        call = self._calls.get(total)
        if call is None or call.own.shape != (width, num_tokens, total):
            call = self._calls[total] = _Call(self._engine, self._visible.shape, num_tokens, self._shape.vocab_size)
            call.bind(self._encoded, self._caches)
        return call

    def _reserve(self, count: int) -> int:
        """Takes the next `count` slots and returns the first; makes room where there is too little."""
        if self._num_slots + count > self._visible.shape[2]:
            self._make_room(count)
        first = self._num_slots
        self._num_slots += count
        return first

    def _make_room(self, count: int) -> None:
        """Drops the slots that no row attends, and doubles the capacity until a quarter of it is free afterwards.

        Without that quarter a cache which is full of living slots would be compacted again at every token.
        """
        living = [np.flatnonzero(each.any(axis=0)) for each in self._visible]
        needed = max(map(len, living))
        old_capacity = self._visible.shape[2]
        capacity = max(old_capacity, FIRST_CAPACITY)
        while (needed + count) * 4 > capacity * 3:
            capacity *= 2
        if capacity != old_capacity:
            self._calls = {}
        for name in self._cache_names():
            self._caches[name] = self._compact(self._caches.get(name), name, living, capacity)
        old, self._visible = self._visible, np.zeros((*self._visible.shape[:2], capacity), dtype=np.bool_)
        for prompt, slots in enumerate(living):
            self._visible[prompt, :, : len(slots)] = old[prompt][:, slots]
        self._num_slots = needed

    def _compact(self, cache: Array | None, name: str, living: Sequence[Slots], capacity: int) -> Array:
        """Moves the living slots of each prompt to the front, in place unless the capacity changes."""
        shape = self._shape
        sizes = (len(living), shape.num_heads, capacity, shape.head_dim)
        if cache is None:
            return np.zeros(sizes, dtype=self._engine.inputs[name])
        target = cache if cache.shape == sizes else np.zeros(sizes, dtype=cache.dtype)
        for prompt, slots in enumerate(living):
            target[prompt, :, : len(slots)] = cache[prompt][:, slots]
        return target

    def _cache_names(self) -> list[str]:
        return [f"past_key_values.{i}.{part}" for i in range(self._shape.num_layers) for part in ("key", "value")]


class _Call:
    """The buffers and the binding of decoder calls of one shape."""

    def __init__(self, engine: Engine, visible_shape: tuple[int, ...], num_tokens: int, vocab_size: int) -> None:
        """Args:
        engine: `decoder.onnx`.
        visible_shape: `(P, K, C)`: prompts, rows of each, capacity.
        num_tokens: Tokens of each row, n; the graph is fed S = K·n a prompt.
        vocab_size: Columns of the logits.
        """
        prompts, width, capacity = visible_shape
        total = width * num_tokens
        self._sizes = (prompts, width, num_tokens)
        self._input_ids: Ids = np.zeros((prompts, total), dtype=np.int64)
        self._positions: Ids = np.zeros((prompts, total), dtype=np.int64)
        self._offsets = np.arange(num_tokens)
        self._slots: Ids = np.zeros((prompts, total), dtype=np.int64)
        self._visible: Bools = np.zeros((prompts, total, capacity), dtype=np.bool_)
        # (K, n, S): a token attends itself and those before it in its own row, of those that are fed with it
        causal = np.tri(num_tokens, dtype=np.bool_)
        self.own: Bools = np.kron(np.eye(width, dtype=np.bool_), causal).reshape(width, num_tokens, total)
        self.logits: Floats = np.zeros((prompts, total, vocab_size), dtype=np.float32)
        self.binding: Binding = engine.bind()

    def bind(self, encoded: Mapping[str, Array], caches: Mapping[str, Array]) -> None:
        """Ties all buffers to the graph."""
        binding = self.binding
        binding.bind_input("input_ids", self._input_ids)
        binding.bind_input("positions", self._positions)
        binding.bind_input("slots", self._slots)
        binding.bind_input("visible", self._visible)
        for name, array in encoded.items():
            binding.bind_input(name, array)
        for name, cache in caches.items():
            binding.bind_input(name, cache)
            binding.bind_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits", self.logits)

    def prepare(self, token_ids: Ids, lengths: Ids, visible: Bools, first: int, max_positions: int) -> None:
        """Fills the inputs of the next run.

        Args:
            token_ids: `(P·K, n)`.
            lengths: `(P, K)`, tokens that each row has already.
            visible: `(P, K, C)`, the slots that hold them.
            first: The first slot to write to.
            max_positions: Of the model.
        """
        self._input_ids[:] = token_ids.reshape(self._input_ids.shape)
        positions = self._positions.reshape(self._sizes)
        np.add(lengths[..., None], self._offsets, out=positions)
        # what pads a short draft may lie beyond the last position; nobody reads its logits
        np.minimum(positions, max_positions - 1, out=positions)
        self._slots[:] = np.arange(first, first + self._slots.shape[1])
        masks = self._visible.reshape(*self._sizes, -1)
        masks[:] = visible[:, :, None]
        masks[..., first : first + self.own.shape[2]] |= self.own
