"""Opening sessions of ONNX Runtime: their options, and errors that tell what to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from florence_onnx.bundles.memory import is_out_of_memory
from florence_onnx.errors import (
    BundleFileMissingError,
    CorruptGraphError,
    DeviceMemoryError,
    InputError,
    MissingExtraError,
    ProviderError,
)
from florence_onnx.runtime import cpu, cuda, graph_cache
from florence_onnx.runtime.providers import ProviderList

SessionOptions = Mapping[str, Any]
"""Attributes of `onnxruntime.SessionOptions` by name; a key with a dot is a session config entry."""

CPU = "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
CUDA_PROVIDERS = ("CUDAExecutionProvider", TENSORRT)
CUDA_GRAPHS = {"CUDAExecutionProvider": "enable_cuda_graph"}
"""The provider option that lets a session capture CUDA graphs, one for each of its bindings."""
SINGLE_CUDA_GRAPH = "trt_cuda_graph_enable"
"""TensorRT's option of that kind. Its provider (as of ONNX Runtime 1.31) keeps one graph a session and does not read `gpu_graph_id`: every
later run would replay that of the first binding, on the first binding's buffers."""
LOG_ERRORS = 3
"""ONNX Runtime's level of logging without warnings."""
RECORD_NODES = "session.record_ep_graph_assignment_info"
"""Session config entry, since ONNX Runtime 1.24: note which provider took which nodes."""
_log = logging.getLogger("florence_onnx")
_ERRORS = (
    "Fail",
    "InvalidArgument",
    "InvalidGraph",
    "InvalidProtobuf",
    "NoModel",
    "NotImplemented",
    "RuntimeException",
    "EPFail",
    "EngineError",
    "NotFound",
)


def onnxruntime() -> ModuleType:
    """The installed ONNX Runtime, whichever package brought it.

    Raises:
        MissingExtraError: There is none.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    module: ModuleType = ort
    return module


def default_session_options(provider: str) -> dict[str, Any]:
    """What is set unless the caller says otherwise: see benchmarks/results/session_options.md for the measurements.

    Args:
        provider: The execution provider that comes first.
    """
    options: dict[str, Any] = {
        "intra_op_num_threads": cpu.num_cores(),
        "inter_op_num_threads": 1,
        # Otherwise the threads of one graph still wait actively for work while the next graph runs: 1.15 s instead of
        # 1.30 s for 48 tokens of Florence-2-base in fp32 on two cores.
        "session.force_spinning_stop": "1",
        # 1376 MiB instead of 1580 at the peak of Florence-2-base in fp32, in the same time
        "enable_mem_pattern": False,
    }
    if provider != CPU:
        options[RECORD_NODES] = "1"
    return options


def open_session(
    ort: ModuleType,
    path: Path,
    chosen: ProviderList,
    overrides: SessionOptions | None,
    kept: Path | None,
) -> Any:
    """Opens a session.

    Args:
        ort: The module onnxruntime.
        path: The graph.
        chosen: Execution providers with their options.
        overrides: Of `default_session_options`.
        kept: Folder of `graph_cache`, or None.

    Raises:
        InputError: An option is unknown or of a wrong kind.
        BundleFileMissingError: External data is missing.
        CorruptGraphError: It is no graph that ONNX Runtime accepts.
        ProviderError: The first provider does not take it.
        DeviceMemoryError: The device has no memory for its weights.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise InputError(f'session_options must be a dict such as {{"intra_op_num_threads": 2}}, got {overrides!r}')
    if chosen[0][0] in CUDA_PROVIDERS:
        cuda.preload(ort)
    settings = {**default_session_options(chosen[0][0]), **(overrides or {})}

    def create(file: Path, more: SessionOptions) -> Any:
        return _create_session(ort, file, chosen, _session_options(ort, {**settings, **more}))

    if kept is None or [name for name, _ in chosen] != [CPU]:
        return create(path, {})
    no_optimization = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return graph_cache.load(
        path, kept, settings, runtime=ort.__version__, no_optimization=no_optimization, create=create
    )


def _session_options(ort: ModuleType, settings: SessionOptions) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = LOG_ERRORS
    for name, value in settings.items():
        if "." in name:
            options.add_session_config_entry(name, str(value))
            continue
        if not hasattr(options, name) or callable(getattr(options, name)):
            raise InputError(f"onnxruntime.SessionOptions has no attribute {name!r}")
        try:
            setattr(options, name, value)
        except TypeError as error:
            raise InputError(f"onnxruntime.SessionOptions.{name} cannot be {value!r}: {error}") from error
    return options


def _create_session(ort: ModuleType, path: Path, chosen: ProviderList, options: Any) -> Any:
    state = ort.capi.onnxruntime_pybind11_state
    errors = raised_by(ort)
    if chosen[0][0] != CPU:  # what the start of a GPU provider raises is not always one of ONNX Runtime's own classes
        errors += (RuntimeError, ValueError)
    try:
        if chosen[0][0] in CUDA_PROVIDERS:
            # a kernel of theirs warns of repeated indices at every node that scatters, past the session's own level; ours are distinct
            ort.set_default_logger_severity(LOG_ERRORS)
        # enable_fallback=0: a provider that does not start must not become the CPU behind the caller's back
        return ort.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
    except state.NoSuchFile as error:
        raise BundleFileMissingError(f"a file that {path} needs is missing: {error}") from error
    except errors as error:
        if is_out_of_memory(error):
            raise out_of_memory(chosen[0][0], error) from error
        if chosen[0][0] != CPU:
            missing = _obstacles(ort, chosen[0][0])
            raise ProviderError(f"{chosen[0][0]} could not take {path.name}: {error}{missing}") from error
        raise CorruptGraphError(
            f"{path} does not load; export or download it again. ONNX Runtime says: {error}"
        ) from error


def raised_by(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises."""
    state = ort.capi.onnxruntime_pybind11_state
    return tuple(getattr(state, name) for name in _ERRORS if hasattr(state, name))


def out_of_memory(provider: str, error: BaseException) -> DeviceMemoryError:
    """What to raise where ONNX Runtime says that a device is full."""
    return DeviceMemoryError(
        f"{provider} has not enough memory: {str(error).strip()}; a smaller max_batch, fewer beams or an fp16 bundle "
        "need less, and `florence-onnx info` tells how much"
    )


def check_provider(ort: ModuleType, obtained: Sequence[str], chosen: ProviderList) -> str:
    """The provider that was asked for, if it is the one that a session has.

    Raises:
        ProviderError: It is another.
    """
    wanted = chosen[0][0]
    if obtained[0] != wanted:
        usual = "; usually the driver or a CUDA, cuDNN or TensorRT library is missing or of another major version"
        raise ProviderError(
            f"{wanted} was asked for but did not start (ONNX Runtime fell back to {', '.join(obtained)})"
            f"{_obstacles(ort, wanted) or usual}"
        )
    return wanted


def _obstacles(ort: ModuleType, provider: str) -> str:
    """What is seen to be missing for a provider, as the end of a sentence."""
    found = cuda.obstacles(str(getattr(ort, "cuda_version", ""))) if provider in CUDA_PROVIDERS else []
    if provider == TENSORRT:
        found += cuda.tensorrt_obstacles(ort)
    return f": {'; '.join(found)}" if found else ""


def count_nodes(session: Any) -> dict[str, int]:
    """Nodes by execution provider; empty where ONNX Runtime cannot tell (before 1.24, or `RECORD_NODES` off)."""
    if session.get_session_options().get_session_config_entry(RECORD_NODES) != "1":
        return {}
    counts: dict[str, int] = {}
    for part in getattr(session, "get_provider_graph_assignment_info", list)():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def report_nodes(path: Path, provider: str, nodes: Mapping[str, int]) -> None:
    """Logs how many nodes a provider leaves to others."""
    left = {name: count for name, count in nodes.items() if name != provider}
    if left:
        rest = ", ".join(f"{count} to {name}" for name, count in left.items())
        _log.info("%s: %s takes %d nodes and leaves %s", path.name, provider, nodes.get(provider, 0), rest)
