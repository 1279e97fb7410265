"""One decoder call on a device: what crosses between host and device for it, and the bindings of its shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from florence_onnx.bundles.bundle import LOG_SUMS, TOP_IDS, TOP_VALUES
from florence_onnx.generation.scores import Floats, TopScores
from florence_onnx.inference.decoder import DecoderShape
from florence_onnx.inference.slot_table import CallInputs
from florence_onnx.runtime.device_memory import DeviceArray, DeviceMemory
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine

TEXT_LENGTHS = (16, 32, 64, 128, 256)
"""Tokens to which prompts are padded, so that few shapes occur; the last is what the model has room for."""
ALIGNMENT = 256
"""Of tensors within a block, in bytes: what CUDA's own allocations have."""


def padded_count(count: int) -> int:
    """As how many prompts or images so many are run, so that few shapes occur: the least power of two."""
    return 1 << (max(1, count) - 1).bit_length()


@dataclass(frozen=True)
class ResidentSizes:
    """Sizes that do not change."""

    shape: DecoderShape
    num_image_tokens: int
    width: int
    """Columns of the image features."""

    def text_length(self, num_tokens: int) -> int:
        """The padded length of a prompt."""
        room = self.shape.max_positions - self.num_image_tokens
        return next((length for length in TEXT_LENGTHS if num_tokens <= length < room), room)


class Packed:
    """Tensors that cross between host and device together."""

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
        """A tensor's place there."""
        offset, shape, dtype = self._fields[name]
        return DeviceArray(self._block.block, self._block.address + offset, shape, dtype)

    def on_host(self, name: str) -> npt.NDArray[Any]:
        """A tensor's place here: what `send` sends, what `receive` got."""
        offset, shape, dtype = self._fields[name]
        size = int(np.prod(shape)) * dtype.itemsize
        return self._content[offset : offset + size].view(dtype).reshape(shape)

    def send(self) -> None:
        """Host to device."""
        self._block.upload(self._content)

    def receive(self) -> None:
        """Device to host."""
        self._content = self._block.download()


class DecoderCall:
    """Buffers and bindings of decoder calls of one shape."""

    def __init__(
        self,
        engine: OnnxEngine,
        num_places: int,
        num_tokens: int,
        capacity: int,
        num_top: int,
        sizes: ResidentSizes,
    ) -> None:
        """Args:
        engine: `decoder_top.onnx`.
        num_places: P, prompts from the first place on.
        num_tokens: S, tokens of each.
        capacity: C, slots of each.
        num_top: Tokens that the engine gives back.
        sizes: Of the model.
        """
        memory = engine.memory
        self.num_places = num_places
        self._engine = engine
        tokens = num_places, num_tokens
        self._vocab_size = sizes.shape.vocab_size
        whole = dict.fromkeys(("input_ids", "positions", "slots"), (tokens, np.int64))
        self._sent = Packed(memory, {**whole, "visible": ((*tokens, capacity), np.bool_)})
        best = *tokens, num_top
        self._received = Packed(
            memory, {TOP_VALUES: (best, np.float32), TOP_IDS: (best, np.int64), LOG_SUMS: (tokens, np.float32)}
        )
        self._logits = memory.allocate((*tokens, self._vocab_size), np.float32)
        self.inputs = CallInputs(*(self._sent.on_host(name) for name in (*whole, "visible")))
        self._fetched: Floats | None = None
        self._bindings: list[OnnxBinding] = []

    @property
    def logits_bytes(self) -> int:
        """Bytes of its logits on the device."""
        return self._logits.nbytes

    def bind(self, tensors: Mapping[str, DeviceArray], phases: Sequence[Mapping[str, DeviceArray]]) -> None:
        """Ties all buffers to the graph.

        Args:
            tensors: Inputs that it only reads.
            phases: The self keys and values; of several sets each is read in turn while the next is written.
        """
        for phase, caches in enumerate(phases):
            binding = self._engine.bind()
            written = phases[(phase + 1) % len(phases)]
            for name in ("input_ids", "positions", "slots", "visible"):
                binding.bind_input(name, self._sent.on_device(name))
            for name, array in (*tensors.items(), *caches.items()):
                binding.bind_input(name, array)
            for name, array in written.items():
                binding.bind_output(name.replace("past_key_values", "present"), array)
            for name in (TOP_VALUES, TOP_IDS, LOG_SUMS):
                binding.bind_output(name, self._received.on_device(name))
            binding.bind_output("logits", self._logits)
            binding.capture()
            self._bindings.append(binding)

    def release(self) -> None:
        """Forgets the CUDA graphs."""
        for binding in self._bindings:
            binding.release()

    def run(self, phase: int) -> None:
        """Sends the inputs, runs, receives the best tokens."""
        self._fetched = None
        self._sent.send()
        self._bindings[phase].run()
        self._received.receive()

    def scores(self, place: int, shape: tuple[int, ...]) -> TopScores:
        """What a prompt's `(W, n)` tokens led to."""
        count = shape[0] * shape[1]
        values, ids, log_sums = (
            self._received.on_host(name)[place, :count].reshape(*shape, *inner)
            for name, inner in ((TOP_VALUES, (-1,)), (TOP_IDS, (-1,)), (LOG_SUMS, ()))
        )

        def fetch() -> Floats:
            return self._all_logits()[place, :count].reshape(*shape, -1)

        return TopScores(values, ids, log_sums, self._vocab_size, fetch)

    def _all_logits(self) -> Floats:
        """The logits of all places, copied to the host when the first of them is asked for."""
        if self._fetched is None:
            self._fetched = self._logits.download()
        return self._fetched
