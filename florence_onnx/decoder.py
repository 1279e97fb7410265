"""The text encoder and decoder over engines: encoding prompts, decode steps, and the KV cache.

`TextModel` is this project's own pair of graphs; the layout of transformers.js has its own class with the same two
methods in `transformers_js.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.engine import Binding, Engine
from florence_onnx.generation import DecoderSession

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

FIRST_CAPACITY = 64
"""Tokens that a new cache has room for; it doubles up to the model's number of positions."""


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
    """A decoder session whose self-attention cache is written in place.

    The rows of one prompt share its cross-attention keys and values. The cache arrays are graph input and output at
    once; they and the bindings are replaced only when the number of rows or the capacity changes.
    """

    def __init__(self, engine: Engine, shape: DecoderShape, encoded: Mapping[str, Array]) -> None:
        """Args:
        engine: `decoder.onnx`.
        shape: Sizes of the cache.
        encoded: Cross keys and values and `encoder_attention_mask`, by the decoder's input names.
        """
        self._engine = engine
        self._shape = shape
        self._encoded = dict(encoded)
        self._length = 0
        self._capacity = 0
        self._caches: dict[str, Array] = {}
        self._binding: Binding | None = None
        self._input_ids: Ids = np.zeros((0, 0), dtype=np.int64)
        self._past_lengths: Ids = np.zeros(0, dtype=np.int64)
        self._logits: Floats = np.zeros((0, 0), dtype=np.float32)

    def step(self, token_ids: Ids) -> Floats:
        rows, num_tokens = token_ids.shape
        self._reserve(rows, self._length + num_tokens)
        if self._binding is None or self._input_ids.shape != token_ids.shape:
            self._bind(rows, num_tokens)
        assert self._binding is not None
        self._input_ids[:] = token_ids
        self._past_lengths[:] = self._length
        self._binding.run()
        self._length += num_tokens
        return self._logits

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        if len(prompts) != len(self._encoded["encoder_attention_mask"]):
            self._encoded = {name: array[prompts] for name, array in self._encoded.items()}
            self._binding = None
        same_number = len(rows) == len(self._past_lengths)
        if same_number and np.array_equal(rows, np.arange(len(rows))):
            return
        for name, cache in self._caches.items():
            if same_number:
                used = self._used(name, cache)
                used[:] = used[rows]
            else:
                self._caches[name] = cache[rows]
                self._binding = None

    def _used(self, name: str, cache: Array) -> Array:
        """The part of a cache that holds tokens: keys are `(rows, H, d, C)`, values `(rows, H, C, d)`."""
        return cache[..., : self._length] if name.endswith(".key") else cache[..., : self._length, :]

    def _reserve(self, rows: int, length: int) -> None:
        """Makes room for `length` tokens a row, keeping what is there."""
        if self._caches and length <= self._capacity:
            return
        capacity = max(self._capacity, min(FIRST_CAPACITY, self._shape.max_positions))
        while capacity < length:
            capacity = min(2 * capacity, self._shape.max_positions)
        old, self._capacity, self._binding = self._caches, capacity, None
        self._caches = {name: self._empty(name, rows) for name in self._cache_names()}
        for name, cache in old.items():
            self._used(name, self._caches[name])[:] = self._used(name, cache)

    def _cache_names(self) -> list[str]:
        return [f"past_key_values.{i}.{part}" for i in range(self._shape.num_layers) for part in ("key", "value")]

    def _empty(self, name: str, rows: int) -> Array:
        shape = self._shape
        inner = (shape.head_dim, self._capacity) if name.endswith(".key") else (self._capacity, shape.head_dim)
        return np.zeros((rows, shape.num_heads, *inner), dtype=self._engine.inputs[name])

    def _bind(self, rows: int, num_tokens: int) -> None:
        self._input_ids = np.zeros((rows, num_tokens), dtype=np.int64)
        self._past_lengths = np.zeros(rows, dtype=np.int64)
        self._logits = np.zeros((rows, self._shape.vocab_size), dtype=np.float32)
        binding = self._engine.bind()
        binding.bind_input("input_ids", self._input_ids)
        binding.bind_input("past_lengths", self._past_lengths)
        for name, array in self._encoded.items():
            binding.bind_input(name, np.ascontiguousarray(array, dtype=self._engine.inputs[name]))
        for name, cache in self._caches.items():
            binding.bind_input(name, cache)
            binding.bind_output(name.replace("past_key_values", "present"), cache)
        binding.bind_output("logits", self._logits)
        self._binding = binding
