"""Tensors that stay where the kernels are: in a card's memory, or on the host for the CPU provider.

Everything is ONNX Runtime's own: it allocates, and copies from and to numpy. Graphs read and write by address, so a part of a
tensor along its first axis is a tensor too, and nothing is copied to make a batch or to take one apart.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
CopyRows = Callable[[int, int, int, int, int, int], None]
"""Copies `rows` of `width` bytes within one memory: target address, target pitch, source address, source pitch, width, rows."""


class Block:
    """Memory allocated at once."""

    def __init__(self, memory: DeviceMemory, value: Any) -> None:
        """Args: value, an `OrtValue` of bytes."""
        self.memory = memory
        self.value = value
        self.address = int(value.data_ptr())


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous tensor in a device's memory, whole or a part of one along its first axis."""

    block: Block
    """Kept for as long as a part of it is in use."""
    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def memory(self) -> DeviceMemory:
        """Where it is."""
        return self.block.memory

    @property
    def nbytes(self) -> int:
        """Bytes of the content."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, first: slice) -> DeviceArray:
        """Entries along the first axis, without a step."""
        start, stop, _ = first.indices(self.shape[0])
        step = self.nbytes // self.shape[0]
        return DeviceArray(self.block, self.address + start * step, (stop - start, *self.shape[1:]), self.dtype)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same numbers, or the first of them, in another shape."""
        assert math.prod(shape) * self.dtype.itemsize <= self.nbytes
        return DeviceArray(self.block, self.address, shape, self.dtype)

    def upload(self, values: Array) -> None:
        """Takes over a host array of the same number of bytes; the tensor is all of its block."""
        self.block.value.update_inplace(np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def download(self) -> Array:
        """A copy on the host; reads the block as a whole."""
        content = self.block.value.numpy()
        start = self.address - self.block.address
        # a copy: on the host ONNX Runtime gives the memory itself
        found: Array = content[start : start + self.nbytes].copy().view(self.dtype).reshape(self.shape)
        return found


class DeviceMemory:
    """The memory of one device."""

    def __init__(
        self,
        ort: ModuleType,
        device: str,
        index: int,
        copy_rows: CopyRows,
        guarded: Callable[[Callable[[], Any]], Any],
    ) -> None:
        """Args:
        ort: The module onnxruntime.
        device: `"cpu"` or `"cuda"`, as `OrtValue` has them.
        index: Which card.
        copy_rows: Copies within it.
        guarded: Calls something of ONNX Runtime's, and raises errors of ours.
        """
        self._guarded = guarded
        self.device = device
        self.index = index
        self._ort = ort
        self._copy_rows = copy_rows

    def is_same(self, other: DeviceMemory) -> bool:
        """Whether addresses of both mean the same."""
        return (self.device, self.index) == (other.device, other.index)

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new tensor of zeros: what is masked is multiplied by zero, which a leftover NaN would survive.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """
        kind = np.dtype(dtype)
        size = max(1, math.prod(shape) * kind.itemsize)
        value = self._guarded(lambda: self._new_value(size))
        block = Block(self, value)
        return DeviceArray(block, block.address, shape, kind)

    def _new_value(self, size: int) -> Any:
        value = self._ort.OrtValue.ortvalue_from_shape_and_type([size], np.uint8, self.device, self.index)
        value.update_inplace(np.zeros(size, dtype=np.uint8))
        return value

    def copy(self, source: DeviceArray, target: DeviceArray, num_axes: int = 0) -> None:
        """Copies the source's rows to the starts of the target's.

        Args:
            source: A row is what lies below the first `num_axes` axes.
            target: At least as many rows, of at least that length.
            num_axes: 0 copies everything as one row.
        """
        rows = math.prod(source.shape[:num_axes])
        width = source.nbytes // rows
        pitch = target.nbytes // math.prod(target.shape[:num_axes])
        self._copy_rows(target.address, pitch, source.address, width, width, rows)


def copy_rows_on_host(target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
    """`CopyRows` for the host's own memory."""
    for row in range(rows):
        ctypes.memmove(target + row * target_pitch, source + row * source_pitch, width)
