"""The GPU: description of it and its software, peak memory, measured rates, and the floor that follows from them."""

from __future__ import annotations

import ctypes
import importlib.metadata
import platform
import shutil
import site
import subprocess
import sysconfig
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks import machine
from benchmarks.costs import Costs
from benchmarks.gpu.timing import Effort, timed

PACKAGES = ("onnxruntime-gpu", "onnxruntime", "torch", "transformers", "tokenizers", "numpy", "onnx", "pillow")
FACTS = (
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "clocks.sm",
    "clocks.max.sm",
    "power.limit",
    "compute_cap",
)
COPY_BYTES = 4 * 2**30
"""Bytes of the array whose copy is timed; much more than the GPU's L2 cache."""
GEMM_SIZE = 8192
"""Rows, columns and depth of the products that are timed."""
PROMPT_TOKENS = 12
"""Typical number of tokens of a task's prompt."""


def describe() -> dict[str, Any]:
    """Describes machine, GPU, packages and libraries, without creating a session."""
    import onnxruntime

    return {
        "machine": machine.describe(),
        "gpu": _nvidia_smi(FACTS),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "onnxruntime": [onnxruntime.__version__, getattr(onnxruntime, "cuda_version", "")],
        "providers": onnxruntime.get_available_providers(),
        "tensorrt": find_tensorrt(),
        "library_folders": library_folders(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(fields: tuple[str, ...]) -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return dict(zip(fields, (value.strip() for value in done.stdout.split("\n")[0].split(",")), strict=False))


def find_tensorrt() -> str:
    """Returns the file name of TensorRT 10, which ONNX Runtime's provider needs; empty if it cannot be loaded."""
    name = "libnvinfer.so.10"
    try:
        ctypes.CDLL(name)
    except OSError:
        return ""
    return name


def library_folders() -> list[str]:
    """Returns the folders of CUDA and cuDNN in NVIDIA's wheels, relative to the folder of packages."""
    return [str(Path(*path.parts[-3:])) for path in _library_paths()]


def library_path() -> str:
    """Returns these folders as a value of LD_LIBRARY_PATH."""
    return ":".join(map(str, _library_paths()))


def _library_paths() -> list[Path]:
    roots = dict.fromkeys([sysconfig.get_paths()["purelib"], *site.getsitepackages()])
    return [folder for root in roots for folder in sorted(Path(root).glob("nvidia/*/lib"))]


# -------------------------------------------------------------------------------------------------------------- memory


class Memory:
    """Measures the peak device memory during a block, minus the memory in use before it.

    The driver is polled every few milliseconds. The figure includes the CUDA context, libraries and every allocator,
    and other processes on the same GPU.
    """

    INTERVAL = 0.005
    """Seconds between two polls."""

    def __init__(self) -> None:
        self._read = _memory_reader()
        self._is_done = threading.Event()
        self._thread: threading.Thread | None = None
        self._before = self._most = 0

    @property
    def is_known(self) -> bool:
        return self._read is not None

    def __enter__(self) -> Memory:
        if self._read is not None:
            self._before = self._most = self._read()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_done.set()
        if self._thread is not None:
            self._thread.join()

    def peak(self) -> dict[str, Any]:
        """Returns `peak_mb` so far, in 10**6 bytes, or the reason why it is `unknown`."""
        if self._read is None:
            return {"unknown": "no NVIDIA driver"}
        return {"peak_mb": (self._most - self._before) / 1e6, "before_mb": self._before / 1e6}

    def _watch(self) -> None:
        assert self._read is not None
        while not self._is_done.wait(self.INTERVAL):
            self._most = max(self._most, self._read())


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _memory_reader() -> Any:
    """Returns a function that reads the bytes in use on GPU 0; None without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, info = ctypes.c_void_p(), _NvmlMemory()
    if nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
        return None

    def read() -> int:
        nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(info))
        return int(info.used)

    return read


# --------------------------------------------------------------------------------------------------------------- rates


def measure_rates(
    device: str, effort: Effort, *, copy_bytes: int = COPY_BYTES, size: int = GEMM_SIZE
) -> dict[str, Any]:
    """Measures `copy` in bytes per second (read plus written), and products in three dtypes in operations per second.

    Args:
        device: `cpu`; anything else is the GPU.
        effort: Warm-ups and repeats of each measurement.
        copy_bytes: Bytes of the array that is copied.
        size: Rows, columns and depth of the products.

    Raises:
        ImportError: torch is not installed.
    """
    import torch

    place = "cpu" if device == "cpu" else "cuda"

    def seconds(call: Callable[[], object]) -> float:
        def run() -> None:
            call()
            if place == "cuda":
                torch.cuda.synchronize()

        return float(timed(run, effort)["min_ms"]) / 1e3

    def copy_rate() -> float:
        source = torch.ones(copy_bytes // 4, device=place)
        target = torch.empty_like(source)
        return 2 * source.nbytes / seconds(lambda: target.copy_(source))

    def product_rate(name: str) -> float:
        a, b = (torch.randn(size, size, device=place).to(getattr(torch, name)) for _ in range(2))
        return 2 * size**3 / seconds(lambda: a @ b)

    return {"copy": copy_rate(), **{name: product_rate(name) for name in ("float16", "bfloat16", "float32")}}


def costs(model: Costs, prompt_tokens: int = PROMPT_TOKENS) -> dict[str, Any]:
    """Returns operations and bytes of the stages of one request in fp16."""
    past = 16
    steps = {
        name: model.step_bytes("fp16", prompt_tokens=prompt_tokens, past=past, num_beams=beams) or 0.0
        for name, beams in (("step_greedy", 1), ("step_beams", 3))
    }
    return {
        "vision_gflop": model.vision_flops() / 1e9,
        "text_encoder_gflop": model.text_encoder_flops(prompt_tokens) / 1e9,
        "decoder_parameters": model.decoder_parameters(),
        "step_mb": {name: size / 1e6 for name, size in steps.items()},
    }


def floor_ms(needed: Mapping[str, Any], rates: Mapping[str, float]) -> dict[str, float]:
    """Returns lower bounds on the times of the stages, in milliseconds.

    Args:
        needed: What `costs` returned.
        rates: What `measure_rates` returned.
    """
    found = {stage: needed[f"{stage}_gflop"] * 1e9 / rates["float16"] for stage in ("vision", "text_encoder")}
    # The copy rate counts bytes read and written; a decode step only reads, at the same total rate of the memory.
    found |= {name: megabytes * 1e6 / rates["copy"] for name, megabytes in needed["step_mb"].items()}
    return {name: round(seconds * 1e3, 4) for name, seconds in found.items()}
