"""Why ONNX Runtime's CUDA provider does not start: which of the libraries it needs cannot be loaded."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from typing import Any

Load = Callable[[str], Any]

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"
"""What every onnxruntime-gpu since 1.19 needs."""


def obstacles(cuda_version: str, load: Load = ctypes.CDLL) -> list[str]:
    """What stands between this machine and the CUDA provider, as far as it shows without a session; may be empty.

    Args:
        cuda_version: Of which CUDA the installed onnxruntime is, e.g. `"13.0"`; empty where it does not say.
        load: Loads a library by name, or raises OSError.
    """
    if not sys.platform.startswith("linux"):
        return []
    found = []
    driver = _loaded(DRIVER, load)
    if driver is None:
        found.append(f"no NVIDIA driver ({DRIVER} not found)")
    major = cuda_version.partition(".")[0]
    if major:
        names = [f"{name}.so.{major}" for name in ("libcudart", "libcublas", "libcublasLt")]
        missing = [name for name in names if _loaded(name, load) is None]
        if missing:
            found.append(f"this onnxruntime is for CUDA {major}, and {', '.join(missing)} not found")
    if _loaded(CUDNN, load) is None:
        found.append(f"no cuDNN 9 ({CUDNN} not found)")
    if driver is not None:
        found += _of_driver(driver, major)
    return found


def _loaded(name: str, load: Load) -> Any:
    try:
        return load(name)
    except OSError:
        return None


def _of_driver(driver: Any, major: str) -> list[str]:
    version, count = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    if status:
        return [f"the driver does not start (cuInit answers {status})"]
    found = []
    # thousands are the major version: 12080 is CUDA 12.8
    if not driver.cuDriverGetVersion(ctypes.byref(version)) and major.isdigit() and version.value // 1000 < int(major):
        found.append(
            f"the driver is too old: up to CUDA {version.value // 1000}, and this onnxruntime is for CUDA {major}"
        )
    if not driver.cuDeviceGetCount(ctypes.byref(count)) and not count.value:
        found.append("the driver sees no card")
    return found
