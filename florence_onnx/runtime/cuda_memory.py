"""GPU memory through CUDA's runtime library (libcudart), which ONNX Runtime has loaded already.

ONNX Runtime's own tensors on a GPU, `OrtValue`, round their size up to a power of two, are copied as a whole only, and
not to rows of another pitch, which a growing cache needs.

While one thread captures a CUDA graph, no other thread of the process may call CUDA, so every call is made under
`LOCK`. A tensor may be garbage collected in any thread, also during a capture. Its memory is therefore not freed then,
but goes to a free list: the next allocation of the same size takes it from there, or returns it to CUDA.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import weakref
from collections import deque
from typing import Any

from florence_onnx import forks
from florence_onnx.errors import DeviceMemoryError, ProviderError
from florence_onnx.runtime.device_memory import Array, Block, DeviceMemory

LOCK = forks.Lock(threading.RLock)
"""Held while a thread calls CUDA or runs an ONNX Runtime session on a GPU: one thread of the process at a time."""
MAJORS = ("13", "12", "11.0")
"""Versions of libcudart to look for where ONNX Runtime does not say which CUDA it is built for (before 1.21)."""
TO_DEVICE, TO_HOST, WITHIN_DEVICE = 1, 2, 3
"""`cudaMemcpyHostToDevice`, `cudaMemcpyDeviceToHost`, `cudaMemcpyDeviceToDevice`."""
OUT_OF_MEMORY = 2
"""`cudaErrorMemoryAllocation`."""
MAX_FREE_BYTES = 64 * 2**20
"""Most bytes on the free list: enough for the features of some images, not for the buffers of a batch of prompts."""
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
    """The memory of one GPU."""

    device = "cuda"

    def __init__(self, cuda_version: str, index: int = 0) -> None:
        """Args:
        cuda_version: The CUDA that the installed onnxruntime is built for, e.g. `"13.0"`; empty where it does not say.
        index: CUDA's number of the GPU.

        Raises:
            ProviderError: CUDA's runtime library is not found.
        """
        self.index = index
        self._forks = forks.count()
        self._library = _load(cuda_version.partition(".")[0])
        # (size, address). A deque, because finalizers append to it in any thread, and its append is atomic.
        self._free_list: deque[tuple[int, int]] = deque()

    def new_block(self, size: int) -> Block:
        with LOCK:
            address = self._reuse(size) or self._malloc(size)
            block = Block(self, address)
            weakref.finalize(block, self._free_list.append, (size, address)).atexit = False
            self._call("cudaMemset", address, 0, size)
            # Sessions run on streams of their own, which do not wait for the stream of this memset.
            self._call("cudaDeviceSynchronize")
        return block

    def _reuse(self, size: int) -> int | None:
        """Takes a block of this very size from the free list, and frees the others if they exceed `MAX_FREE_BYTES`."""
        blocks = self._pop_all()
        fitting = next((block for block in blocks if block[0] == size), None)
        if fitting is not None:
            blocks.remove(fitting)
        if sum(block[0] for block in blocks) > MAX_FREE_BYTES:
            self._free(blocks)
        else:
            self._free_list.extend(blocks)
        return None if fitting is None else fitting[1]

    def _pop_all(self) -> list[tuple[int, int]]:
        return [self._free_list.popleft() for _ in range(len(self._free_list))]

    def _free(self, blocks: list[tuple[int, int]]) -> None:
        for _, address in blocks:
            self._call("cudaFree", address)

    def _malloc(self, size: int) -> int:
        """Allocates from CUDA; where memory is full, once more after all of the free list was freed."""
        pointer = _POINTER()
        if self._try_malloc(pointer, size):
            return int(pointer.value or 0)
        self._free(self._pop_all())
        if self._try_malloc(pointer, size):
            return int(pointer.value or 0)
        raise DeviceMemoryError(
            f"GPU {self.index} has no {size} bytes left; a smaller max_batch, fewer beams or an fp16 bundle need less, and "
            "`florence-onnx info` tells how much"
        )

    def _try_malloc(self, pointer: Any, size: int) -> bool:
        self._call("cudaSetDevice", self.index)
        status = int(self._library.cudaMalloc(ctypes.byref(pointer), size))
        if status == OUT_OF_MEMORY:
            # CUDA keeps a failed call's status until it is read. ONNX Runtime reads it after its next kernel launch,
            # and would report this failure, which is handled here, as that kernel's.
            self._library.cudaGetLastError()
            return False
        self._check(status)
        return True

    def write(self, address: int, values: Array) -> None:
        with LOCK:
            self._call("cudaMemcpy", address, values.ctypes.data, values.nbytes, TO_DEVICE)
            # From pageable memory the copy may still be in progress when cudaMemcpy returns.
            self._call("cudaDeviceSynchronize")

    def read(self, address: int, target: Array) -> None:
        with LOCK:
            self._call("cudaMemcpy", target.ctypes.data, address, target.nbytes, TO_HOST)

    def copy_rows(self, target: int, pitch: int, source: int, width: int, rows: int) -> None:
        with LOCK:
            self._call("cudaMemcpy2D", target, pitch, source, width, width, rows, WITHIN_DEVICE)
            self._call("cudaDeviceSynchronize")

    def pin(self, array: Array) -> None:
        """Pins (page-locks) a host array until it is garbage collected, so that copies run at the speed of the bus.

        Raises:
            ProviderError: CUDA refuses.
        """
        with LOCK:
            self._call("cudaHostRegister", array.ctypes.data, array.nbytes, 0)
        weakref.finalize(array, _unpin, self._library, array.ctypes.data, self._forks).atexit = False

    def _call(self, name: str, *arguments: int) -> None:
        if forks.count() != self._forks:
            raise ProviderError(forks.UNUSABLE.format("CUDA"))
        self._check(int(getattr(self._library, name)(*arguments)))

    def _check(self, status: int) -> None:
        if status:
            self._library.cudaGetLastError()
            text = self._library.cudaGetErrorString(status) or b"unknown"
            raise ProviderError(f"CUDA failed with error {status}: {text.decode(errors='replace')}")


def _open(major: str) -> Any:
    """The first libcudart that is found, of one major version or of any."""
    pattern = "cudart64_{}.dll" if sys.platform == "win32" else "libcudart.so.{}"
    names = [pattern.format(version) for version in ([major] if major else MAJORS)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise ProviderError(f"{' or '.join(names)} not found; to install it: pip install nvidia-cuda-runtime")


def _unpin(library: Any, address: int, num_forks: int) -> None:
    if forks.count() != num_forks:
        return  # pinned by a process that this one was forked from
    with LOCK:
        library.cudaHostUnregister(address)


def _load(major: str) -> Any:
    """libcudart with the signatures of the functions that are used.

    Args:
        major: Major version of CUDA; empty where ONNX Runtime does not say.
    """
    library = _open(major)
    for function, arguments in _SIGNATURES.items():
        getattr(library, function).argtypes = arguments
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library
