"""A decoder call on a device: the tensors that cross between host and device for it, and the bindings of its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from florence_onnx.bundles.bundle import LOG_SUMS, TOP_IDS, TOP_VALUES
from florence_onnx.generation.scores import Floats, TopScores
from florence_onnx.inference.decoder import DecoderShape, present_name
from florence_onnx.inference.decoder_inputs import DecoderInputs, input_fields
from florence_onnx.runtime.device_memory import DeviceArray, DeviceMemory
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine

TEXT_LENGTHS = (16, 32, 64, 128, 256)
"""Lengths in tokens to which prompts are padded, so that few shapes occur; longer ones to the model's maximum."""
ALIGNMENT = 256
"""Bytes to which tensors within a block are aligned, as `cudaMalloc` aligns its blocks."""


def padded_count(count: int) -> int:
    """The batch size at which `count` prompts or images are run: the next power of two, so that few shapes occur."""
    return 1 << (max(1, count) - 1).bit_length()


@dataclass(frozen=True)
class ResidentSizes:
    """Sizes of the model that device buffers depend on."""

    shape: DecoderShape
    num_image_tokens: int
    """N at the default image size."""
    width: int
    """D, columns of the image features."""

    def encoder_length(self, num_tokens: int, num_image_tokens: int) -> int:
        """The encoder positions for a prompt of `num_tokens` tokens, padded, behind its image tokens."""
        longest = self.shape.max_positions - num_image_tokens
        padded = next((length for length in TEXT_LENGTHS if num_tokens <= length < longest), longest)
        return num_image_tokens + padded


class PackedTensors:
    """Tensors in one block of device memory with one copy on the host, so that they cross in one transfer."""

    def __init__(self, memory: DeviceMemory, fields: Mapping[str, tuple[tuple[int, ...], npt.DTypeLike]]) -> None:
        """Args: fields, shape and dtype by name."""
        offsets, size = {}, 0
        for name, (shape, dtype) in fields.items():
            offsets[name] = size
            size += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // ALIGNMENT) * ALIGNMENT
        self._block = memory.allocate((size,), np.uint8)
        self._content = np.zeros(size, dtype=np.uint8)
        self._fields = {name: (offsets[name], shape, np.dtype(dtype)) for name, (shape, dtype) in fields.items()}

    def on_device(self, name: str) -> DeviceArray:
        """A tensor in device memory."""
        offset, shape, dtype = self._fields[name]
        return DeviceArray(self._block.block, self._block.address + offset, shape, dtype)

    def on_host(self, name: str) -> npt.NDArray[Any]:
        """A view of a tensor's host copy: what `upload` will send, or what the last `download` received."""
        offset, shape, dtype = self._fields[name]
        size = int(np.prod(shape)) * dtype.itemsize
        return self._content[offset : offset + size].view(dtype).reshape(shape)

    def upload(self) -> None:
        """Copies all tensors to the device."""
        self._block.upload(self._content)

    def download(self) -> None:
        """Copies all tensors to the host, into a new array: views from `on_host` keep the values that they had."""
        self._content = self._block.download()


class DecoderCall:
    """Buffers and bindings for decoder calls of one shape."""

    def __init__(
        self,
        engine: OnnxEngine,
        batch_size: int,
        num_tokens: int,
        capacity: int,
        num_top: int,
        sizes: ResidentSizes,
    ) -> None:
        """Args:
        engine: `decoder_top.onnx`.
        batch_size: P, how many batch indices are run, from the first on.
        num_tokens: S, tokens of each prompt.
        capacity: C, slots of each prompt's cache.
        num_top: How many top-k tokens the graph returns for each token that it is fed.
        sizes: Of the model.
        """
        memory = engine.memory
        self.batch_size = batch_size
        self._engine = engine
        tokens = batch_size, num_tokens
        self._vocab_size = sizes.shape.vocab_size
        fields = input_fields(batch_size, num_tokens, capacity)
        self._sent = PackedTensors(memory, fields)
        top = *tokens, num_top
        self._received = PackedTensors(
            memory, {TOP_VALUES: (top, np.float32), TOP_IDS: (top, np.int64), LOG_SUMS: (tokens, np.float32)}
        )
        self._logits = memory.allocate((*tokens, self._vocab_size), np.float32)
        self.inputs = DecoderInputs(**{name: self._sent.on_host(name) for name in fields})
        self._downloaded: Floats | None = None
        self._bindings: list[OnnxBinding] = []

    @property
    def logits_bytes(self) -> int:
        """Bytes of its logits in device memory."""
        return self._logits.nbytes

    def bind(self, tensors: Mapping[str, DeviceArray], cache_sets: Sequence[Mapping[str, DeviceArray]]) -> None:
        """Binds all buffers to the graph's inputs and outputs: one binding for each cache set that is read.

        Args:
            tensors: Inputs that the graph only reads.
            cache_sets: Self KV. A single set is updated in place; of two, one is read while the other is written.
        """
        for at, caches in enumerate(cache_sets):
            binding = self._engine.bind()
            written = cache_sets[(at + 1) % len(cache_sets)]
            for name in vars(self.inputs):
                binding.bind_input(name, self._sent.on_device(name))
            for name, array in (*tensors.items(), *caches.items()):
                binding.bind_input(name, array)
            for name, array in written.items():
                binding.bind_output(present_name(name), array)
            for name in (TOP_VALUES, TOP_IDS, LOG_SUMS):
                binding.bind_output(name, self._received.on_device(name))
            binding.bind_output("logits", self._logits)
            binding.capture()
            self._bindings.append(binding)

    def release(self) -> None:
        """Releases the captured graphs; no call may follow."""
        for binding in self._bindings:
            binding.release()

    def run(self, cache_set: int) -> None:
        """Uploads the inputs, runs the graph and downloads the top-k tokens; the logits stay on the device.

        Args:
            cache_set: Index of the cache set that is read.
        """
        self._downloaded = None
        self._sent.upload()
        self._bindings[cache_set].run()
        self._received.download()

    def scores(self, batch_index: int, shape: tuple[int, ...]) -> TopScores:
        """The scores after each of a prompt's tokens in the last run; all logits are downloaded only if a search asks.

        Args:
            batch_index: Of the prompt.
            shape: `(K, n)`, the rows of the prompt and the tokens that each was fed.
        """
        count = shape[0] * shape[1]
        values, ids, log_sums = (
            self._received.on_host(name)[batch_index, :count].reshape(*shape, *inner)
            for name, inner in ((TOP_VALUES, (-1,)), (TOP_IDS, (-1,)), (LOG_SUMS, ()))
        )

        def fetch() -> Floats:
            return self._all_logits()[batch_index, :count].reshape(*shape, -1)

        return TopScores(values, ids, log_sums, self._vocab_size, fetch)

    def _all_logits(self) -> Floats:
        """The logits of the whole batch `(P, S, V)`, downloaded once per run, when a search first asks for some."""
        if self._downloaded is None:
            self._downloaded = self._logits.download()
        return self._downloaded
