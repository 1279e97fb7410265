"""CUDA's runtime library, for the two things that ONNX Runtime's Python interface lacks: copies within a card's memory whose rows
have other distances, and host memory that a card reads by itself.

ONNX Runtime has loaded the library already; this finds the same one by its name.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from florence_onnx.errors import ProviderError

DEVICE_TO_DEVICE = 3
"""`cudaMemcpyDeviceToDevice`."""


class CudaRuntime:
    """`libcudart` of the CUDA that the installed onnxruntime is for."""

    def __init__(self, cuda_version: str, index: int = 0) -> None:
        """Args:
        cuda_version: As onnxruntime gives it, e.g. `"13.0"`.
        index: Which card.

        Raises:
            ProviderError: The library is not there.
        """
        major = cuda_version.partition(".")[0]
        name = f"cudart64_{major}.dll" if sys.platform == "win32" else f"libcudart.so.{major}"
        self._index = index
        try:
            self._library: Any = ctypes.CDLL(name)
        except OSError as error:
            raise ProviderError(
                f"{name} not found ({error}); it comes with: pip install nvidia-cuda-runtime"
            ) from error
        self._library.cudaMemcpy2D.argtypes = [
            *(ctypes.c_void_p, ctypes.c_size_t) * 2,
            *(ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int),
        ]
        self._library.cudaHostRegister.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        self._library.cudaHostUnregister.argtypes = [ctypes.c_void_p]
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def copy_rows(self, target: int, target_pitch: int, source: int, source_pitch: int, width: int, rows: int) -> None:
        """`device_memory.CopyRows` for a card; done when it returns.

        Raises:
            ProviderError: CUDA refuses.
        """
        library = self._library
        self._check(library.cudaSetDevice(self._index))
        self._check(library.cudaMemcpy2D(target, target_pitch, source, source_pitch, width, rows, DEVICE_TO_DEVICE))
        # such a copy may still be under way, and the sessions' streams do not wait for it
        self._check(library.cudaDeviceSynchronize())

    def register(self, address: int, size: int) -> None:
        """Pins host memory, so that copies to the card run at the bus's speed.

        Raises:
            ProviderError: CUDA refuses.
        """
        self._check(self._library.cudaSetDevice(self._index))
        self._check(self._library.cudaHostRegister(address, size, 0))

    def unregister(self, address: int) -> None:
        """Ends `register`.

        Raises:
            ProviderError: CUDA refuses.
        """
        self._check(self._library.cudaHostUnregister(address))

    def _check(self, status: int) -> None:
        if status:
            said = self._library.cudaGetErrorString(status) or b"unknown"
            raise ProviderError(f"CUDA failed with error {status}: {said.decode(errors='replace')}")
