"""Tensors that stay where the kernels are: in a card's memory, or on the host for the CPU provider.

Graphs read and write by address, so a part of a tensor along its first axis is a tensor too, and nothing is copied to make a batch or to
take one apart.
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
    """Memory that was taken at once, and is given back with the last tensor in it."""

    def __init__(self, memory: DeviceMemory, address: int, owner: object = None) -> None:
        """Args:
        memory: Of which it is a part.
        address: Where it begins.
        owner: What must live as long.
        """
        self.memory = memory
        self.address = address
        self.owner = owner


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
        size = self.nbytes // self.shape[0]
        return DeviceArray(self.block, self.address + start * size, (stop - start, *self.shape[1:]), self.dtype)

    def upload(self, values: Array) -> None:
        """Takes over a host array of the same number of bytes; done when it returns."""
        assert values.nbytes == self.nbytes
        self.memory.write(self.address, np.ascontiguousarray(values))

    def download(self) -> Array:
        """A copy on the host."""
        found = np.empty(self.shape, dtype=self.dtype)
        self.memory.read(self.address, found)
        return found


class DeviceMemory(ABC):
    """The memory of one device."""

    device: str
    """`"cpu"` or `"cuda"`, as ONNX Runtime has them."""
    index: int
    """Which card."""

    def allocate(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """A new tensor of zeros: what is masked is multiplied by zero, which a leftover NaN would survive.

        Raises:
            DeviceMemoryError: There is not enough memory.
        """
        kind = np.dtype(dtype)
        block = self.new_block(max(1, math.prod(shape) * kind.itemsize))
        return DeviceArray(block, block.address, shape, kind)

    def is_same(self, other: DeviceMemory) -> bool:
        """Whether addresses of both mean the same."""
        return (self.device, self.index) == (other.device, other.index)

    def copy(self, source: DeviceArray, target: DeviceArray, num_axes: int = 0) -> None:
        """Copies the source's rows to the starts of the target's; done when it returns.

        Args:
            source: A row is what lies below the first `num_axes` axes.
            target: At least as many rows, of at least that length.
            num_axes: 0 copies everything as one row.
        """
        rows = math.prod(source.shape[:num_axes])
        width = source.nbytes // rows
        pitch = target.nbytes // math.prod(target.shape[:num_axes])
        self.copy_rows(target.address, pitch, source.address, width, rows)

    @abstractmethod
    def new_block(self, size: int) -> Block:
        """So many bytes, all zero."""

    @abstractmethod
    def write(self, address: int, values: Array) -> None:
        """Copies a host array to the device."""

    @abstractmethod
    def read(self, address: int, target: Array) -> None:
        """Copies from the device to a host array."""

    @abstractmethod
    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        """Copies `rows` adjacent rows of `width` bytes to addresses that are `pitch` bytes apart."""


class HostMemory(DeviceMemory):
    """The host's own, for providers that compute there."""

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
