"""Times of each graph alone, with all buffers on the device: the stages without the runtime around them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime

from benchmarks.gpu.figures import Figures
from benchmarks.gpu.hardware import PROMPT_TOKENS
from benchmarks.gpu.timing import Effort, device_time, timed
from florence_onnx.bundles import bundle as bundles

CUDA = {"cudnn_conv_algo_search": "HEURISTIC", "enable_skip_layer_norm_strict_mode": "1"}
"""Provider options that the runtime sets too."""
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", CUDA),
    "cuda-graph": ("CUDAExecutionProvider", {**CUDA, "enable_cuda_graph": "1"}),
    "cuda-exhaustive": ("CUDAExecutionProvider", {**CUDA, "cudnn_conv_algo_search": "EXHAUSTIVE"}),
    "cuda-nhwc": ("CUDAExecutionProvider", {**CUDA, "prefer_nhwc": "1"}),
    "tensorrt": ("TensorrtExecutionProvider", {"trt_fp16_enable": "1", "trt_engine_cache_enable": "1"}),
}
"""Execution provider and its options."""
VISION_ONLY = ("cuda-exhaustive", "cuda-nhwc")
"""Variants that affect convolutions only."""
CAPACITY = 128
"""Slots of the decoder's KV cache."""
_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


def measure(
    bundle: Path,
    num_image_tokens: int,
    device: str,
    variants: Sequence[str],
    batches: Sequence[int],
    effort: Effort,
    figures: Figures,
) -> None:
    """Times every graph.

    Args:
        bundle: Directory of a bundle.
        num_image_tokens: Image tokens of its model.
        device: `cpu`, or `cuda` for both GPU providers.
        variants: Keys of `VARIANTS`.
        batches: Numbers of images or prompts.
        effort: Warm-ups and repeats of each figure.
        figures: Receives the figures, named `GRAPH VARIANT SIZES`.
    """
    decoder = bundles.DECODER_TOP if (bundle / bundles.DECODER_TOP).is_file() else bundles.DECODER
    prompt = {"text_length": PROMPT_TOKENS, "encoder_length": num_image_tokens + PROMPT_TOKENS, "capacity": CAPACITY}
    prompt["image_tokens"] = num_image_tokens  # an axis of bundles for several image sizes
    for variant in variants:
        cases: dict[str, list[tuple[str, dict[str, int]]]] = {
            bundles.VISION_ENCODER: [(f"batch {n}", {"batch": n}) for n in batches if n <= 8],
            bundles.TEXT_ENCODER: [(f"prompts {n}", {"prompts": n, **prompt}) for n in batches],
            decoder: [
                (f"prompts {n} rows {rows}", {"prompts": n, "length": rows, **prompt})
                for n in batches
                for rows in (1, 3)
            ],
        }
        for graph, sizes in cases.items():
            if variant not in VISION_ONLY or graph == bundles.VISION_ENCODER:
                _measure_graph(bundle / graph, device, variant, sizes, effort, figures)


def _measure_graph(
    path: Path,
    device: str,
    variant: str,
    cases: Sequence[tuple[str, dict[str, int]]],
    effort: Effort,
    figures: Figures,
) -> None:
    name = f"{path.stem} {variant}"
    sessions: list[Any] = []
    figures.attempt(f"{name} load", lambda: _timed_load(path, variant, sessions))
    for index, (label, sizes) in enumerate(cases if sessions else ()):
        runs: list[Callable[[], None]] = []
        figures.attempt(f"{name} {label}", partial(_timed_run, sessions[0], device, sizes, index, effort, runs))
        if runs and device != "cpu":
            figures.attempt(f"{name} {label} device", partial(device_time, runs[0]))


def _timed_load(path: Path, variant: str, sessions: list[Any]) -> dict[str, Any]:
    """Creates a session, appends it to `sessions`, and returns the seconds that it took."""
    import time

    provider, options = VARIANTS[variant]
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    if provider.startswith("Tensorrt"):
        options = {**options, "trt_engine_cache_path": str(path.parent / "tensorrt")}
    begin = time.perf_counter()
    session = onnxruntime.InferenceSession(str(path), settings, providers=[(provider, options)], enable_fallback=0)
    if session.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} did not start: {session.get_providers()}")
    sessions.append(session)
    return {"seconds": time.perf_counter() - begin}


def _timed_run(
    session: Any,
    device: str,
    sizes: Mapping[str, int],
    graph_id: int,
    effort: Effort,
    runs: list[Callable[[], None]],
) -> dict[str, Any]:
    """Times runs with one set of buffers, and appends the run to `runs`. Each set has a CUDA graph id of its own."""
    binding, buffers = _bind(session, device, sizes)
    options = onnxruntime.RunOptions()
    with contextlib.suppress(RuntimeError):  # the entry exists for the CUDA provider only
        options.add_run_config_entry("gpu_graph_id", str(graph_id + 1))

    def run() -> None:
        assert buffers
        session.run_with_iobinding(binding, options)

    found = timed(run, effort)
    runs.append(run)
    return found


def _bind(session: Any, device: str, sizes: Mapping[str, int]) -> tuple[Any, dict[str, Any]]:
    """Binds buffers for all inputs and outputs; KV caches are written in place."""
    binding = session.io_binding()
    buffers: dict[str, Any] = {}
    rng = np.random.default_rng(0)
    for node in session.get_inputs():
        shape = _shape(node, sizes)
        array = _content(node.name, shape, _DTYPES[node.type], rng)
        buffers[node.name] = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
        binding.bind_ortvalue_input(node.name, buffers[node.name])
    for node in session.get_outputs():
        past = node.name.replace("present", "past_key_values")
        if node.name.startswith("present.") and past in buffers:
            binding.bind_ortvalue_output(node.name, buffers[past])
            continue
        shape = _shape(node, sizes)
        buffers[node.name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, _DTYPES[node.type], device, 0)
        binding.bind_ortvalue_output(node.name, buffers[node.name])
    return binding, buffers


def _shape(node: Any, sizes: Mapping[str, int]) -> list[int]:
    unknown = [size for size in node.shape if not isinstance(size, int) and size not in sizes]
    if unknown:
        raise ValueError(f"{node.name} has the axis {unknown[0]!r}, whose size is not known here")
    return [size if isinstance(size, int) else sizes[size] for size in node.shape]


def _content(
    name: str, shape: Sequence[int], dtype: type[np.generic], rng: np.random.Generator
) -> npt.NDArray[np.generic]:
    """Returns plausible values of an input."""
    if dtype is np.bool_ or name.endswith("mask"):
        return np.ones(shape, dtype=dtype)
    if name in ("positions", "slots"):  # the first slots, each once
        return np.broadcast_to(np.arange(shape[-1]), shape).astype(dtype)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(4, 200, shape).astype(dtype)
    return rng.standard_normal(shape, dtype=np.float32).astype(dtype)
