"""Tensors in the memory that kernels use: a GPU's, or the host's for providers that compute there.

Graphs read and write tensors by address. A slice along the first axis is therefore a tensor too, and a batch can be put
together, or taken apart, without a copy.
"""

from __future__ import annotations

import ctypes
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Block:
    """One allocation; its memory is given back when the last tensor in it is garbage collected."""

    def __init__(self, memory: DeviceMemory, address: int, owner: object = None) -> None:
        """Args:
        memory: The device's.
        address: Of the first byte.
        owner: An object that must live as long as the block.
        """
        self.memory = memory
        self.address = address
        self.owner = owner


@dataclass(frozen=True)
class DeviceArray:
    """A C-contiguous tensor in device memory, or a slice of one along its first axis."""

    block: Block
    """The allocation that the tensor lies in, kept alive by it."""
    address: int
    """Of the first element."""
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def memory(self) -> DeviceMemory:
        """The memory of the device that the tensor is on."""
        return self.block.memory

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, first: slice) -> DeviceArray:
        """A slice along the first axis, which shares this tensor's memory; steps are not supported."""
        start, stop, _ = first.indices(self.shape[0])
        size = self.nbytes // self.shape[0]
        return DeviceArray(self.block, self.address + start * size, (stop - start, *self.shape[1:]), self.dtype)

    def upload(self, values: Array) -> None:
        """Copies a host array of the same size in bytes to this tensor, and returns when that is done."""
        assert values.nbytes == self.nbytes
        self.memory.write(self.address, np.ascontiguousarray(values))

    def download(self) -> Array:
        """Copies the tensor to a new array on the host."""
        found = np.empty(self.shape, dtype=self.dtype)
        self.memory.read(self.address, found)
        return found


class DeviceMemory(ABC):
    """The memory of one device."""

    device: str
    """ONNX Runtime's name of the device: `"cpu"` or `"cuda"`."""
    index: int
    """Number of the device."""

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Allocates a tensor of zeros.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """
        # Zeros, because attention multiplies masked values by zero, and a NaN left in the memory would stay NaN.
        kind = np.dtype(dtype)
        block = self.new_block(max(1, math.prod(shape) * kind.itemsize))
        return DeviceArray(block, block.address, shape, kind)

    def is_same(self, other: DeviceMemory) -> bool:
        """Whether both are the memory of the same device, so that addresses mean the same."""
        return (self.device, self.index) == (other.device, other.index)

    def copy(self, source: DeviceArray, target: DeviceArray, num_axes: int = 0) -> None:
        """Copies each row of a tensor to the start of a row of another, and returns when that is done.

        Args:
            source: Its rows are indexed by the first `num_axes` axes; a row is everything behind these.
            target: Has at least as many rows, which are at least as long.
            num_axes: 0 for the whole tensor as one row.
        """
        rows = math.prod(source.shape[:num_axes])
        width = source.nbytes // rows
        pitch = target.nbytes // math.prod(target.shape[:num_axes])
        self.copy_rows(target.address, pitch, source.address, width, rows)

    @abstractmethod
    def new_block(self, size: int) -> Block:
        """Allocates `size` bytes, all zero.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """

    @abstractmethod
    def write(self, address: int, values: Array) -> None:
        """Copies a C-contiguous host array to an address of the device."""

    @abstractmethod
    def read(self, address: int, target: Array) -> None:
        """Copies from an address of the device to a C-contiguous host array."""

    @abstractmethod
    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        """Copies adjacent rows of `width` bytes on the device to addresses that are `pitch` bytes apart."""


class HostMemory(DeviceMemory):
    """The host's memory, for providers that compute there."""

    device = "cpu"
    index = 0

    def new_block(self, size: int) -> Block:
        values = np.zeros(size, dtype=np.uint8)
        return Block(self, values.ctypes.data, values)

    def write(self, address: int, values: Array) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def read(self, address: int, target: Array) -> None:
        ctypes.memmove(target.ctypes.data, address, target.nbytes)

    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        for row in range(rows):
            ctypes.memmove(target + row * pitch, source + row * width, width)
