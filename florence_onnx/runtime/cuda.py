"""NVIDIA's side of this machine: the GPU, the version of TensorRT, and why ONNX Runtime's providers cannot start."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import io
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

Load = Callable[[str], Any]

DRIVER = "libcuda.so.1"
CUDNN = "libcudnn.so.9"
"""The cuDNN that onnxruntime-gpu has needed since 1.19."""
TENSORRT_MAJOR = 10
"""Major version of TensorRT that ONNX Runtime up to 1.31 is built for; used where the provider's file does not tell."""
CAPABILITY = (75, 76)
"""`CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`."""
_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class Gpu:
    """A GPU as the driver describes it.

    Example: `Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984)`
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    """Bytes."""


def find_gpu(index: int = 0, load: Load = ctypes.CDLL) -> Gpu | None:
    """Describes a GPU of this machine, without taking any of its memory.

    Args:
        index: CUDA's number of the GPU.
        load: Loads a library by name, or raises OSError.

    Returns:
        None where there is no driver or no such GPU.
    """
    driver = _try_load(DRIVER, load)
    device, memory, name = ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    if driver is None or driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index):
        return None
    halves = [ctypes.c_int() for _ in CAPABILITY]
    statuses = [
        driver.cuDeviceGetName(name, len(name), device),
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device),
        *(
            driver.cuDeviceGetAttribute(ctypes.byref(half), at, device)
            for half, at in zip(halves, CAPABILITY, strict=True)
        ),
    ]
    if any(statuses):
        return None
    return Gpu(name.value.decode(errors="replace"), (halves[0].value, halves[1].value), memory.value)


@functools.lru_cache(maxsize=1)
def preload(ort: ModuleType) -> None:
    """Loads CUDA, cuDNN and TensorRT from their pip packages, whose folders the dynamic loader does not search.

    A library that is missing is no error here: `diagnose` names it.

    Args:
        ort: The module onnxruntime.
    """
    if hasattr(ort, "preload_dlls"):  # since 1.21
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):  # it prints the libraries that it does not find
            ort.preload_dlls()
        for line in printed.getvalue().splitlines():
            _log.debug("onnxruntime.preload_dlls: %s", line)
    folder = _package("tensorrt_libs")
    if folder is not None:
        for library in _tensorrt_libraries(ort):
            _try_load(str(folder / library), ctypes.CDLL)


def _package(name: str) -> Path | None:
    """Folder of an installed package, found without importing it."""
    spec = importlib.util.find_spec(name)
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(folders[0]) if folders else None


def _tensorrt_libraries(ort: ModuleType | None) -> tuple[str, str]:
    """Names of the TensorRT libraries that the installed provider is linked against."""
    major = str(TENSORRT_MAJOR)
    if ort is not None and getattr(ort, "__file__", None):
        provider = Path(str(ort.__file__)).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
        found = re.search(rb"libnvinfer\.so\.(\d+)", provider.read_bytes()) if provider.is_file() else None
        major = found[1].decode() if found else major
    return f"libnvinfer.so.{major}", f"libnvonnxparser.so.{major}"


def tensorrt_version(ort: ModuleType | None = None, load: Load = ctypes.CDLL) -> str:
    """Version of the TensorRT that ONNX Runtime loads, e.g. `"10.13.3"`; empty where there is none."""
    library = _try_load(_tensorrt_libraries(ort)[0], load)
    if library is None:
        return ""
    number = int(library.getInferLibVersion())
    # NvInferVersion.h: major * 10000 + minor * 100 + patch since TensorRT 10
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def diagnose(cuda_version: str, load: Load = ctypes.CDLL) -> list[str]:
    """Why the CUDA provider cannot start on this machine, as far as can be seen without opening a session.

    Args:
        cuda_version: The CUDA that the installed onnxruntime is built for, e.g. `"13.0"`; empty where it does not say.
        load: Loads a library by name, or raises OSError.

    Returns:
        One clause for each problem; empty where none was found, and on other systems than Linux.
    """
    if not sys.platform.startswith("linux"):
        return []
    found = []
    driver = _try_load(DRIVER, load)
    if driver is None:
        found.append(f"no NVIDIA driver ({DRIVER} not found)")
    major = cuda_version.partition(".")[0]
    if major:
        names = [f"{name}.so.{major}" for name in ("libcudart", "libcublas", "libcublasLt")]
        missing = [name for name in names if _try_load(name, load) is None]
        if missing:
            found.append(f"this onnxruntime is for CUDA {major}, and {', '.join(missing)} not found")
    if _try_load(CUDNN, load) is None:
        found.append(f"no cuDNN 9 ({CUDNN} not found)")
    if found and driver is not None:
        found[-1] += "; to install the libraries with pip: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if driver is not None:
        found += _diagnose_driver(driver, major)
    return found


def diagnose_tensorrt(ort: ModuleType | None = None, load: Load = ctypes.CDLL) -> list[str]:
    """Why the TensorRT provider cannot start on this machine, beyond what `diagnose` finds.

    Args:
        ort: The module onnxruntime.
        load: Loads a library by name, or raises OSError.

    Returns:
        As `diagnose`.
    """
    if not sys.platform.startswith("linux"):
        return []
    names = _tensorrt_libraries(ort)
    missing = [name for name in names if _try_load(name, load) is None]
    if not missing:
        return []
    major = int(names[0].rpartition(".")[2])
    return [
        f"no TensorRT {major} ({', '.join(missing)} not found); to install it: pip install 'tensorrt-cu13>={major},<{major + 1}' "
        "(tensorrt-cu12 for CUDA 12); on a Jetson it is part of JetPack: create the environment with --system-site-packages"
    ]


def _try_load(name: str, load: Load) -> Any:
    """A library, or None where it is not found."""
    try:
        return load(name)
    except OSError:
        return None


def _diagnose_driver(driver: Any, major: str) -> list[str]:
    version, count = ctypes.c_int(), ctypes.c_int()
    status = driver.cuInit(0)
    if status:
        return [f"the driver does not start (cuInit returned {status})"]
    found = []
    # thousands are the major version: 12080 is CUDA 12.8
    if not driver.cuDriverGetVersion(ctypes.byref(version)) and major.isdigit() and version.value // 1000 < int(major):
        found.append(
            f"the driver is too old: it supports up to CUDA {version.value // 1000}, and this onnxruntime is for CUDA {major}"
        )
    if not driver.cuDeviceGetCount(ctypes.byref(count)) and not count.value:
        found.append("the driver sees no GPU")
    return found
