"""The text encoder and decoder with KV caches that stay on a device: prompts share one batch and are stepped together.

The batch has `batch_size` entries, the first axis of every buffer. A prompt is added at a free `batch_index` and stays
there until it is removed; other prompts come and go beside it. Between two steps nothing in the caches moves. A step
uploads one small block (tokens, positions, slots, mask) and downloads another (the top-k tokens after each token).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from florence_onnx.bundles.bundle import TOP_IDS
from florence_onnx.errors import DeviceMemoryError
from florence_onnx.generation.scores import Ids, TopScores
from florence_onnx.inference.decoder import FIRST_CAPACITY
from florence_onnx.inference.decoder_call import DecoderCall, PackedTensors, ResidentSizes, padded_count
from florence_onnx.inference.slot_table import SlotTable
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine

MAX_LOGITS_BYTES = 256 * 2**20
"""Device memory for the logits of all call shapes together; a single shape may take more."""
CAPACITY_GROWTH = 4
"""Factor by which a cache that is too small grows: few sizes, since each has captured graphs of its own."""


class ResidentDecoder:
    """A batch of prompts on one device. For one thread only: see `continuous_batching.ContinuousBatch`."""

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
        self._tables: dict[int, SlotTable] = {}
        self._features = {sizes.num_image_tokens: self._new_features(sizes.num_image_tokens)}
        self._reset()

    def _new_features(self, num_image_tokens: int) -> DeviceArray:
        return self._memory.allocate((1, num_image_tokens, self._sizes.width), np.float32)

    # ------------------------------------------------------------------------------------------------ the batch

    @property
    def batch_size(self) -> int:
        """How many prompts the buffers hold; 0 before `allocate`."""
        return self._batch_size

    @property
    def capacity(self) -> int:
        """Slots of each prompt's self KV cache."""
        return self._capacity

    @property
    def encoder_length(self) -> int:
        """Image and prompt tokens of the longest request that can be added now; shorter prompts are padded to it."""
        return self._encoder_length

    def padded_length(self, prompt_ids: Ids, features: DeviceArray) -> int:
        """The `encoder_length` that a prompt `(T,)` about features `(N, D)` needs."""
        return self._sizes.encoder_length(len(prompt_ids), features.shape[0])

    def allocate(self, batch_size: int, encoder_length: int) -> None:
        """Allocates the buffers of an empty batch, unless they are there already.

        Raises:
            DeviceMemoryError: There is not enough memory; the batch size is then 0.
        """
        assert not self._tables, "prompts are in flight"
        # A cache that grew further is not kept: it was for answers that are rarely so long.
        is_small = self._capacity <= CAPACITY_GROWTH * FIRST_CAPACITY
        if (batch_size, encoder_length) == (self._batch_size, self._encoder_length) and is_small:
            return
        self.release()
        try:
            self._allocate(batch_size, encoder_length)
        except MemoryError:
            self.release()
            raise

    def release(self) -> None:
        """Releases all buffers of an empty batch, and its captured graphs."""
        assert not self._tables, "prompts are in flight"
        self._release_calls()
        self._release_encodings()
        self._reset()

    def grow_batch(self, batch_size: int) -> None:
        """Makes the batch larger while prompts are in flight.

        Raises:
            DeviceMemoryError: There is not enough memory; nothing has changed.
        """
        self._resize(batch_size, self._capacity)

    def add(self, prompt_ids: Ids, features: DeviceArray) -> int:
        """Encodes a prompt: writes its cross KV at the lowest free batch index.

        Args:
            prompt_ids: `(T,)`.
            features: `(N, D)` float32 on this device; N + T is at most `encoder_length`.

        Returns:
            The batch index.

        Raises:
            DeviceMemoryError: There is not enough memory; the prompt was not added.
            ProviderError: The provider failed.
        """
        batch_index = min(set(range(self._batch_size)) - set(self._tables))
        num_image_tokens = features.shape[0]
        prompt = self._prompt(num_image_tokens)
        prompt.on_host("input_ids")[0] = prompt_ids[-1]  # padding, which the mask hides: any token
        prompt.on_host("input_ids")[0, : len(prompt_ids)] = prompt_ids
        mask = prompt.on_host("attention_mask")[0]
        mask[:] = np.arange(len(mask)) < len(prompt_ids)
        prompt.upload()
        self._memory.copy(features, self._features[num_image_tokens])  # a captured graph reads at one address
        self._encoding(batch_index, num_image_tokens).run()
        self._mask[batch_index, :num_image_tokens] = 1
        self._mask[batch_index, num_image_tokens:] = mask
        self._mask_on_device.upload(self._mask)
        self._tables[batch_index] = SlotTable(self._capacity, self._sizes.shape.max_positions)
        return batch_index

    def remove(self, batch_index: int) -> None:
        """Frees a batch index; its buffers keep their content until another prompt is added there."""
        del self._tables[batch_index]

    def slot_table(self, batch_index: int) -> SlotTable:
        """The slots of a prompt's cache, to keep some of its draft tokens or to reorder its rows."""
        return self._tables[batch_index]

    # ------------------------------------------------------------------------------------------------------ steps

    def step(self, token_ids: Mapping[int, Ids]) -> dict[int, TopScores]:
        """Runs one decode step for all prompts.

        Args:
            token_ids: `(K, n)` by batch index, for every prompt in the batch; K and n may differ between prompts.

        Returns:
            Scores of K rows after each of n tokens, by batch index; valid until the next step.

        Raises:
            DeviceMemoryError: There is not enough memory for larger caches, or for the step itself.
            ProviderError: The provider failed. After either error the prompts cannot go on and must be removed.
        """
        num_tokens = max(tokens.size for tokens in token_ids.values())
        self._reserve(num_tokens)
        call = self._call(min(self._batch_size, padded_count(max(token_ids) + 1)), num_tokens)
        for batch_index in range(call.batch_size):
            if batch_index in token_ids:
                self._tables[batch_index].feed(token_ids[batch_index], call.inputs, batch_index)
            else:
                call.inputs.pad(batch_index)
        call.run(self._cache_set)
        if not self._decoder.updates_in_place:
            self._cache_set ^= 1
        return {batch_index: call.scores(batch_index, tokens.shape) for batch_index, tokens in token_ids.items()}

    def _reserve(self, num_tokens: int) -> None:
        """Grows all caches until every prompt has room for `num_tokens` more."""
        capacity = self._capacity
        while not all(table.has_room(num_tokens) for table in self._tables.values()):
            capacity *= CAPACITY_GROWTH
            self._resize(self._batch_size, capacity)
            for table in self._tables.values():
                table.grow(capacity)

    def _call(self, batch_size: int, num_tokens: int) -> DecoderCall:
        key = batch_size, num_tokens
        call = self._calls.pop(key, None)
        if call is None:
            try:
                call = self._new_call(batch_size, num_tokens)
            except DeviceMemoryError:  # the buffers of all other shapes make room for this one
                self._evict_calls(0)
                call = self._new_call(batch_size, num_tokens)
            self._evict_calls(MAX_LOGITS_BYTES - call.logits_bytes)
        self._calls[key] = call  # the most recently used shape is the last one to be evicted
        return call

    def _evict_calls(self, allowed: int) -> None:
        """Releases the least recently used shapes until the logits of the others take at most `allowed` bytes."""
        while self._calls and sum(call.logits_bytes for call in self._calls.values()) > allowed:
            self._calls.pop(next(iter(self._calls))).release()

    def _new_call(self, batch_size: int, num_tokens: int) -> DecoderCall:
        call = DecoderCall(self._decoder, batch_size, num_tokens, self._capacity, self._num_top, self._sizes)
        mask = self._mask_on_device[:batch_size]
        tensors = {"encoder_attention_mask": mask, **_first(self._cross, batch_size)}
        call.bind(tensors, [_first(caches, batch_size) for caches in self._caches])
        return call

    def _prompt(self, num_image_tokens: int) -> PackedTensors:
        """The buffers for the ids and mask of a prompt behind that many image tokens, padded to `encoder_length`."""
        prompt = self._prompts.get(num_image_tokens)
        if prompt is None:
            if num_image_tokens not in self._features:
                self._features[num_image_tokens] = self._new_features(num_image_tokens)
            shape = (1, self._encoder_length - num_image_tokens)
            fields = dict.fromkeys(("input_ids", "attention_mask"), (shape, np.int64))
            prompt = self._prompts[num_image_tokens] = PackedTensors(self._memory, fields)
        return prompt

    def _encoding(self, batch_index: int, num_image_tokens: int) -> OnnxBinding:
        """The text encoder bound so that it writes the cross KV of one batch index."""
        key = batch_index, num_image_tokens
        binding = self._encodings.get(key)
        if binding is None:
            binding = self._text_encoder.bind()
            for name in ("input_ids", "attention_mask"):
                binding.bind_input(name, self._prompts[num_image_tokens].on_device(name))
            binding.bind_input("image_features", self._features[num_image_tokens])
            for name, cross in self._cross.items():
                binding.bind_output(name, cross[batch_index : batch_index + 1])
            binding.capture()
            self._encodings[key] = binding
        return binding

    # ---------------------------------------------------------------------------------------------------- buffers

    def _reset(self) -> None:
        self._batch_size = self._encoder_length = 0
        self._capacity = FIRST_CAPACITY
        self._cache_set = 0
        self._cross: dict[str, DeviceArray] = {}
        self._caches: list[dict[str, DeviceArray]] = []
        self._calls: dict[tuple[int, int], DecoderCall] = {}
        # by batch index and number of image tokens, since shapes differ with the latter
        self._encodings: dict[tuple[int, int], OnnxBinding] = {}
        self._prompts: dict[int, PackedTensors] = {}

    def _release_calls(self) -> None:
        for call in self._calls.values():
            call.release()

    def _release_encodings(self) -> None:
        for binding in self._encodings.values():
            binding.release()

    def _allocate(self, batch_size: int, encoder_length: int) -> None:
        memory = self._memory
        self._cross = self._new_cross(batch_size, encoder_length)
        # TensorRT does not promise to read a cache before it writes an output to the same memory. There the two sets
        # take turns: a step reads one and writes the other, at twice the memory.
        num_sets = 1 if self._decoder.updates_in_place else 2
        self._caches = [self._new_caches(batch_size, FIRST_CAPACITY) for _ in range(num_sets)]
        # Encoder positions of batch indices without a prompt are all visible: a softmax over none would be NaN.
        self._mask = np.ones((batch_size, encoder_length), dtype=np.int64)
        self._mask_on_device = memory.allocate(self._mask.shape, np.int64)
        self._mask_on_device.upload(self._mask)
        self._batch_size, self._encoder_length = batch_size, encoder_length

    def _new_cross(self, batch_size: int, encoder_length: int) -> dict[str, DeviceArray]:
        """Cross KV: keys `(P, H, d, E)`, values `(P, H, E, d)`."""
        shape = self._sizes.shape
        found = {}
        for name in shape.key_value_names("cross_key_values"):
            is_key = name.endswith(".key")
            inner = (shape.head_dim, encoder_length) if is_key else (encoder_length, shape.head_dim)
            found[name] = self._memory.allocate((batch_size, shape.num_heads, *inner), self._decoder.inputs[name])
        return found

    def _new_caches(self, batch_size: int, capacity: int) -> dict[str, DeviceArray]:
        """Self KV `(P, H, C, d)`."""
        shape = self._sizes.shape
        sizes = batch_size, shape.num_heads, capacity, shape.head_dim
        return {
            name: self._memory.allocate(sizes, self._decoder.inputs[name])
            for name in shape.key_value_names("past_key_values")
        }

    def _resize(self, batch_size: int, capacity: int) -> None:
        """Replaces the buffers by larger ones with the same content; all are allocated before any is given up."""
        cross, caches = self._cross, [self._new_caches(batch_size, capacity) for _ in self._caches]
        mask = self._mask
        if batch_size != self._batch_size:
            cross = self._new_cross(batch_size, mask.shape[1])
            mask = np.ones((batch_size, mask.shape[1]), dtype=np.int64)
            mask[: self._batch_size] = self._mask
            mask_on_device = self._memory.allocate(mask.shape, np.int64)
            mask_on_device.upload(mask)
            for name, old in self._cross.items():
                self._memory.copy(old, cross[name])
            self._release_encodings()
            self._mask, self._mask_on_device, self._encodings = mask, mask_on_device, {}
        for old_set, new_set in zip(self._caches, caches, strict=True):
            for name, old in old_set.items():
                self._memory.copy(old, new_set[name], num_axes=2)
        self._release_calls()
        self._cross, self._caches, self._calls = cross, caches, {}
        self._batch_size, self._capacity = batch_size, capacity


def _first(arrays: Mapping[str, DeviceArray], count: int) -> dict[str, DeviceArray]:
    """The first `count` entries of each tensor along its first axis."""
    return {name: array[:count] for name, array in arrays.items()}
