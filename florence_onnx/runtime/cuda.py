"""The NVIDIA side of this machine: which card, which TensorRT, and why ONNX Runtime's providers for them do not start."""

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
"""What every onnxruntime-gpu since 1.19 needs."""
TENSORRT_MAJOR = 10
"""Of the TensorRT that ONNX Runtime up to 1.31 is for, where its provider's file does not tell."""
CAPABILITY = (75, 76)
"""`CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `_MINOR`."""
_log = logging.getLogger("florence_onnx")


@dataclass(frozen=True)
class Card:
    """A card as the driver describes it.

    Example: `Card("NVIDIA H100 80GB HBM3", (9, 0), 85_520_809_984)`
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    """Bytes."""


def card(index: int = 0, load: Load = ctypes.CDLL) -> Card | None:
    """A card of this machine, asked without taking any of its memory; None where there is no driver or no such card.

    Args:
        index: Which card.
        load: Loads a library by name, or raises OSError.
    """
    driver = _loaded(DRIVER, load)
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
    return Card(name.value.decode(errors="replace"), (halves[0].value, halves[1].value), memory.value)


@functools.lru_cache(maxsize=1)
def preload(ort: ModuleType) -> None:
    """Loads CUDA, cuDNN and TensorRT from the packages that pip installs them as, where no loader looks by itself.

    What is not there is left to `obstacles` to name.

    Args:
        ort: The module onnxruntime.
    """
    if hasattr(ort, "preload_dlls"):  # since 1.21
        said = io.StringIO()
        with contextlib.redirect_stdout(said):  # it prints what it misses
            ort.preload_dlls()
        for line in said.getvalue().splitlines():
            _log.debug("onnxruntime.preload_dlls: %s", line)
    folder = _package("tensorrt_libs")
    if folder is not None:
        for library in _tensorrt_libraries(ort):
            _loaded(str(folder / library), ctypes.CDLL)


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(places[0]) if places else None


def _tensorrt_libraries(ort: ModuleType | None) -> tuple[str, str]:
    """Names of the libraries that the installed provider is linked with."""
    major = str(TENSORRT_MAJOR)
    if ort is not None and getattr(ort, "__file__", None):
        provider = Path(str(ort.__file__)).parent / "capi" / "libonnxruntime_providers_tensorrt.so"
        found = re.search(rb"libnvinfer\.so\.(\d+)", provider.read_bytes()) if provider.is_file() else None
        major = found[1].decode() if found else major
    return f"libnvinfer.so.{major}", f"libnvonnxparser.so.{major}"


def tensorrt_version(ort: ModuleType | None = None, load: Load = ctypes.CDLL) -> str:
    """Of the TensorRT that ONNX Runtime loads, e.g. `"10.13.3"`; empty where there is none."""
    library = _loaded(_tensorrt_libraries(ort)[0], load)
    if library is None:
        return ""
    number = int(library.getInferLibVersion())
    # NvInferVersion.h: major * 10000 + minor * 100 + patch since TensorRT 10
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


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
    if found and driver is not None:
        found[-1] += "; with pip they come as: pip install 'onnxruntime-gpu[cuda,cudnn]'"
    if driver is not None:
        found += _of_driver(driver, major)
    return found


def tensorrt_obstacles(ort: ModuleType | None = None, load: Load = ctypes.CDLL) -> list[str]:
    """What else stands between this machine and the TensorRT provider; may be empty.

    Args:
        ort: The module onnxruntime.
        load: Loads a library by name, or raises OSError.
    """
    if not sys.platform.startswith("linux"):
        return []
    names = _tensorrt_libraries(ort)
    missing = [name for name in names if _loaded(name, load) is None]
    if not missing:
        return []
    major = int(names[0].rpartition(".")[2])
    return [
        f"no TensorRT {major} ({', '.join(missing)} not found); it comes with: pip install 'tensorrt-cu13>={major},<{major + 1}' "
        "(tensorrt-cu12 for CUDA 12), on a Jetson with JetPack: then make the environment with --system-site-packages"
    ]


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
