"""A card's memory by CUDA's own runtime library, which ONNX Runtime has loaded already.

ONNX Runtime's own way to memory on a card, `OrtValue`, takes the next power of two, copies whole tensors only, and cannot copy rows to
other distances, which a growing cache needs.

While a CUDA graph is captured, no other thread of the process may call CUDA: whoever does, holds `LOCK`. Tensors may be dropped in any
thread at any time; what they held is kept for the next that needs as much, and given back to CUDA by whoever allocates.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import deque
from typing import Any

from florence_onnx.errors import DeviceMemoryError, ProviderError
from florence_onnx.runtime.device_memory import Array, Block, DeviceMemory

LOCK = threading.RLock()
"""Held by this process's only thread that calls CUDA, or runs a session of ONNX Runtime's on a card."""
MAJORS = ("13", "12", "11.0")
"""Versions of CUDA by which its runtime library is looked for where ONNX Runtime does not say which it is for (before 1.21)."""
TO_DEVICE, TO_HOST, WITHIN_DEVICE = 1, 2, 3
"""`cudaMemcpyHostToDevice` and so on."""
OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation`."""
MAX_KEPT = 64 * 2**20
"""Bytes of dropped tensors that are kept for others: features of some images, and not the buffers of many prompts."""
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaSetDevice": (ctypes.c_int,),
    "cudaMalloc": (ctypes.POINTER(_POINTER), _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMemset": (_POINTER, ctypes.c_int, _SIZE),
    "cudaMemcpy": (_POINTER, _POINTER, _SIZE, ctypes.c_int),
    "cudaMemcpy2D": (_POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_int),
    "cudaHostRegister": (_POINTER, _SIZE, ctypes.c_uint),
    "cudaHostUnregister": (_POINTER,),
    "cudaDeviceSynchronize": (),
}


class CudaMemory(DeviceMemory):
    """Of one card."""

    device = "cuda"

    def __init__(self, cuda_version: str, index: int = 0) -> None:
        """Args:
        cuda_version: Of which CUDA the installed onnxruntime is, e.g. `"13.0"`; empty where it does not say.
        index: Which card.

        Raises:
            ProviderError: CUDA's runtime library is not there.
        """
        self.index = index
        self._library = _load(cuda_version.partition(".")[0])
        self._dropped: deque[tuple[int, int]] = deque()  # whose append is safe in any thread, and in a finalizer

    def new_block(self, size: int) -> Block:
        with LOCK:
            address = self._reuse(size) or self._malloc(size)
            block = Block(self, address)
            weakref.finalize(block, self._dropped.append, (size, address)).atexit = False
            self._call("cudaMemset", address, 0, size)
            self._call("cudaDeviceSynchronize")  # sessions have streams of their own, which wait for nobody
        return block

    def _reuse(self, size: int) -> int | None:
        """An address that was dropped, if one has just this size; too much that was dropped goes back to CUDA."""
        dropped = [self._dropped.popleft() for _ in range(len(self._dropped))]
        fitting = next((pair for pair in dropped if pair[0] == size), None)
        if fitting is not None:
            dropped.remove(fitting)
        if sum(pair[0] for pair in dropped) > MAX_KEPT:
            self._free(dropped)
        else:
            self._dropped.extend(dropped)
        return None if fitting is None else fitting[1]

    def _free(self, dropped: list[tuple[int, int]]) -> None:
        for _, address in dropped:
            self._call("cudaFree", address)

    def _malloc(self, size: int) -> int:
        pointer = _POINTER()
        if self._try_malloc(pointer, size):
            return int(pointer.value or 0)
        self._free([self._dropped.popleft() for _ in range(len(self._dropped))])
        if self._try_malloc(pointer, size):
            return int(pointer.value or 0)
        raise DeviceMemoryError(
            f"card {self.index} has no {size} bytes left; a smaller max_batch, fewer beams or an fp16 bundle need less, and "
            "`florence-onnx info` tells how much"
        )

    def _try_malloc(self, pointer: Any, size: int) -> bool:
        self._call("cudaSetDevice", self.index)
        status = int(self._library.cudaMalloc(ctypes.byref(pointer), size))
        if status == OUT_OF_MEMORY:
            self._library.cudaGetLastError()  # else ONNX Runtime would take it for an error of its own next kernel
            return False
        self._check(status)
        return True

    def write(self, address: int, values: Array) -> None:
        with LOCK:
            self._call("cudaMemcpy", address, values.ctypes.data, values.nbytes, TO_DEVICE)
            # from memory that is not pinned it may still be under way
            self._call("cudaDeviceSynchronize")

    def read(self, address: int, target: Array) -> None:
        with LOCK:
            self._call("cudaMemcpy", target.ctypes.data, address, target.nbytes, TO_HOST)

    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        with LOCK:
            self._call("cudaMemcpy2D", target, pitch, source, width, width, rows, WITHIN_DEVICE)
            self._call("cudaDeviceSynchronize")

    def pin(self, array: Array) -> None:
        """Lets the card read a host array by itself, at the speed of the bus, until the array is dropped.

        Raises:
            ProviderError: CUDA refuses.
        """
        with LOCK:
            self._call("cudaHostRegister", array.ctypes.data, array.nbytes, 0)
        weakref.finalize(array, _unpin, self._library, array.ctypes.data).atexit = False

    def _call(self, name: str, *arguments: int) -> None:
        self._check(int(getattr(self._library, name)(*arguments)))

    def _check(self, status: int) -> None:
        if status:
            self._library.cudaGetLastError()
            said = self._library.cudaGetErrorString(status) or b"unknown"
            raise ProviderError(f"CUDA failed with error {status}: {said.decode(errors='replace')}")


def _first(major: str) -> Any:
    pattern = "cudart64_{}.dll" if sys.platform == "win32" else "libcudart.so.{}"
    names = [pattern.format(version) for version in ([major] if major else MAJORS)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ProviderError(f"{' or '.join(names)} not found; it comes with: pip install nvidia-cuda-runtime")


def _unpin(library: Any, address: int) -> None:
    with LOCK:
        library.cudaHostUnregister(address)


def _load(major: str) -> Any:
    """Args: major, version of CUDA; empty where ONNX Runtime does not say."""
    library = _first(major)
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
