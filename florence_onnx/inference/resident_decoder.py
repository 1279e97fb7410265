"""The text graphs with everything on the device: prompts in places of one set of buffers, stepped together.

Between two steps nothing of the caches moves. A step sends one small block to the device (tokens, positions, slots, who attends what) and
gets one back (the best tokens of each row).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from florence_onnx.bundles.bundle import TOP_IDS
from florence_onnx.errors import DeviceMemoryError
from florence_onnx.generation.scores import Ids, TopScores
from florence_onnx.inference.decoder_call import DecoderCall, Packed, ResidentSizes, padded_count
from florence_onnx.inference.slot_table import PromptRows
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine

FIRST_CAPACITY = 64
"""Slots of a prompt's cache to begin with."""
MAX_LOGITS_BYTES = 256 * 2**20
"""Of the logits on the device that all shapes of a step together keep; a single one may need more."""
GROWTH = 4
"""A cache that is too small becomes so many times as large: every size has its own CUDA graphs."""


class ResidentDecoder:
    """Places for prompts on the device. Not for several threads at once."""

    def __init__(self, text_encoder: OnnxEngine, decoder: OnnxEngine, sizes: ResidentSizes) -> None:
        """Args:
        text_encoder: `text_encoder.onnx`.
        decoder: `decoder_top.onnx`.
        sizes: Of the model.
        """
        self._text_encoder = text_encoder
        self._decoder = decoder
        self._sizes = sizes
        self._num_top = int(decoder.output_shapes[TOP_IDS][-1])
        self._memory = decoder.memory
        self._rows: dict[int, PromptRows] = {}
        self._features = self._memory.allocate((1, sizes.num_image_tokens, sizes.width), np.float32)
        self._forget()

    # ---------------------------------------------------------------------------------------------------- places

    @property
    def places(self) -> int:
        """How many prompts there is room for."""
        return self._num_places

    @property
    def capacity(self) -> int:
        """Slots of each prompt's cache."""
        return self._capacity

    @property
    def text_length(self) -> int:
        """The padded length of the prompts that can be added now."""
        return self._text_length

    def padded_length(self, num_tokens: int) -> int:
        """The length that a prompt of so many tokens has among the others."""
        return self._sizes.text_length(num_tokens)

    def open(self, num_places: int, text_length: int) -> None:
        """Makes room for prompts of a length; all places must be free.

        Raises:
            DeviceMemoryError: There is not enough memory; then there is no place at all.
        """
        assert not self._rows, "prompts are being answered"
        is_small = self._capacity <= GROWTH * FIRST_CAPACITY  # larger ones are for answers that are seldom so long
        if (num_places, text_length) == (self._num_places, self._text_length) and is_small:
            return
        self.close()
        try:
            self._allocate(num_places, text_length)
        except MemoryError:
            self.close()
            raise

    def close(self) -> None:
        """Gives all places up, and their memory; all must be free."""
        assert not self._rows, "prompts are being answered"
        self._drop_bindings(self._calls.values(), self._encodings.values())
        self._forget()

    def widen(self, num_places: int) -> None:
        """Makes room for more prompts beside those that are there.

        Raises:
            DeviceMemoryError: There is not enough memory; everything is as before.
        """
        self._resize(num_places, self._capacity)

    def add(self, prompt_ids: Ids, features: DeviceArray) -> int:
        """Encodes a prompt.

        Args:
            prompt_ids: `(T,)`, at most `text_length`.
            features: `(N, D)` float32 on this device.

        Returns:
            Its place.

        Raises:
            DeviceMemoryError: There is not enough memory; the prompt was not added.
            ProviderError: The provider failed.
        """
        place = min(set(range(self._num_places)) - set(self._rows))
        prompt = self._prompt
        prompt.on_host("input_ids")[0] = prompt_ids[-1]
        prompt.on_host("input_ids")[0, : len(prompt_ids)] = prompt_ids
        mask = prompt.on_host("attention_mask")[0]
        mask[:] = np.arange(self._text_length) < len(prompt_ids)
        prompt.send()
        self._memory.copy(features, self._features)
        self._encoding(place).run()
        self._mask[place, self._sizes.num_image_tokens :] = mask
        self._mask_on_device.upload(self._mask)
        self._rows[place] = PromptRows(self._capacity, self._sizes.shape.max_positions)
        return place

    def remove(self, place: int) -> None:
        """Frees a place."""
        del self._rows[place]

    def rows(self, place: int) -> PromptRows:
        """The rows of the prompt in a place, to keep or to reorder them."""
        return self._rows[place]

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, token_ids: Mapping[int, Ids]) -> dict[int, TopScores]:
        """Feeds every prompt its tokens.

        Args:
            token_ids: `(W, n)` by place; every occupied place has some.

        Returns:
            Scores of W rows with n places, by place; valid until the next step.

        Raises:
            DeviceMemoryError: There is not enough memory for a larger cache, or for the step itself.
            ProviderError: The provider failed. After either the prompts cannot go on, and must be removed.
        """
        num_tokens = max(tokens.size for tokens in token_ids.values())
        self._reserve(num_tokens)
        call = self._call(min(self._num_places, padded_count(max(token_ids) + 1)), num_tokens)
        for place in range(call.num_places):
            if place in token_ids:
                self._rows[place].feed(token_ids[place], call.inputs, place)
            else:
                call.inputs.idle(place)
        call.run(self._phase)
        if not self._decoder.updates_in_place:
            self._phase ^= 1
        return {place: call.scores(place, tokens.shape) for place, tokens in token_ids.items()}

    def _reserve(self, num_tokens: int) -> None:
        capacity = self._capacity
        while not all(rows.has_room(num_tokens) for rows in self._rows.values()):
            capacity *= GROWTH
            self._resize(self._num_places, capacity)
            for rows in self._rows.values():
                rows.grow(capacity)

    def _call(self, num_places: int, num_tokens: int) -> DecoderCall:
        key = num_places, num_tokens
        call = self._calls.pop(key, None)
        if call is None:
            try:
                call = self._new_call(num_places, num_tokens)
            except DeviceMemoryError:  # what other shapes hold is given up for this one
                self._drop_calls(0)
                call = self._new_call(num_places, num_tokens)
            self._drop_calls(MAX_LOGITS_BYTES - call.logits_bytes)
        self._calls[key] = call  # the last one used is the last one to go
        return call

    def _drop_calls(self, allowed: int) -> None:
        """Gives up shapes that were not used for the longest time, until the logits of the others have so many bytes at most."""
        while self._calls and sum(call.logits_bytes for call in self._calls.values()) > allowed:
            self._calls.pop(next(iter(self._calls))).release()

    def _new_call(self, num_places: int, num_tokens: int) -> DecoderCall:
        call = DecoderCall(self._decoder, num_places, num_tokens, self._capacity, self._num_top, self._sizes)
        mask = self._mask_on_device[:num_places]
        tensors = {"encoder_attention_mask": mask, **_first(self._cross, num_places)}
        call.bind(tensors, [_first(caches, num_places) for caches in self._caches])
        return call

    def _encoding(self, place: int) -> OnnxBinding:
        binding = self._encodings.get(place)
        if binding is None:
            binding = self._text_encoder.bind()
            for name in ("input_ids", "attention_mask"):
                binding.bind_input(name, self._prompt.on_device(name))
            binding.bind_input("image_features", self._features)
            for name, cross in self._cross.items():
                binding.bind_output(name, cross[place : place + 1])
            binding.capture()
            self._encodings[place] = binding
        return binding

    # ---------------------------------------------------------------------------------------------------- buffers

    def _forget(self) -> None:
        self._num_places = self._text_length = 0
        self._capacity = FIRST_CAPACITY
        self._phase = 0
        self._cross: dict[str, DeviceArray] = {}
        self._caches: list[dict[str, DeviceArray]] = []
        self._calls: dict[tuple[int, int], DecoderCall] = {}
        self._encodings: dict[int, OnnxBinding] = {}

    @staticmethod
    def _drop_bindings(calls: Any, encodings: Any) -> None:
        for call in calls:
            call.release()
        for binding in encodings:
            binding.release()

    def _allocate(self, num_places: int, text_length: int) -> None:
        memory = self._memory
        encoder_length = self._sizes.num_image_tokens + text_length
        self._prompt = Packed(memory, dict.fromkeys(("input_ids", "attention_mask"), ((1, text_length), np.int64)))
        self._cross = self._new_cross(num_places, encoder_length)
        sets = 1 if self._decoder.updates_in_place else 2
        self._caches = [self._new_caches(num_places, FIRST_CAPACITY) for _ in range(sets)]
        self._mask = np.ones((num_places, encoder_length), dtype=np.int64)
        self._mask_on_device = memory.allocate(self._mask.shape, np.int64)
        self._mask_on_device.upload(self._mask)
        self._num_places, self._text_length = num_places, text_length

    def _new_cross(self, num_places: int, encoder_length: int) -> dict[str, DeviceArray]:
        shape = self._sizes.shape
        found = {}
        for name, part in _names("cross_key_values", shape.num_layers):
            inner = (shape.head_dim, encoder_length) if part == "key" else (encoder_length, shape.head_dim)
            found[name] = self._memory.allocate((num_places, shape.num_heads, *inner), self._decoder.inputs[name])
        return found

    def _new_caches(self, num_places: int, capacity: int) -> dict[str, DeviceArray]:
        shape = self._sizes.shape
        sizes = num_places, shape.num_heads, capacity, shape.head_dim
        return {
            name: self._memory.allocate(sizes, self._decoder.inputs[name])
            for name, _ in _names("past_key_values", shape.num_layers)
        }

    def _resize(self, num_places: int, capacity: int) -> None:
        """Other buffers with the same content: all are made before any is given up."""
        cross, caches = self._cross, [self._new_caches(num_places, capacity) for _ in self._caches]
        mask = self._mask
        if num_places != self._num_places:
            cross = self._new_cross(num_places, mask.shape[1])
            mask = np.ones((num_places, mask.shape[1]), dtype=np.int64)
            mask[: self._num_places] = self._mask
            mask_on_device = self._memory.allocate(mask.shape, np.int64)
            mask_on_device.upload(mask)
            for name, old in self._cross.items():
                self._memory.copy(old, cross[name])
            self._drop_bindings([], self._encodings.values())
            self._mask, self._mask_on_device, self._encodings = mask, mask_on_device, {}
        for old_set, new_set in zip(self._caches, caches, strict=True):
            for name, old in old_set.items():
                self._memory.copy(old, new_set[name], num_axes=2)
        self._drop_bindings(self._calls.values(), [])
        self._cross, self._caches, self._calls = cross, caches, {}
        self._num_places, self._capacity = num_places, capacity


def _names(prefix: str, num_layers: int) -> list[tuple[str, str]]:
    """Names of the keys and values of all layers, each with which of both it is."""
    return [(f"{prefix}.{layer}.{part}", part) for layer in range(num_layers) for part in ("key", "value")]


def _first(arrays: Mapping[str, DeviceArray], count: int) -> dict[str, DeviceArray]:
    return {name: array[:count] for name, array in arrays.items()}
