"""Opening ONNX Runtime sessions: their options, and errors that say how to fix the cause."""

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
from florence_onnx.runtime import cpu, cuda, graph_cache, graph_repair, memory_errors, telemetry
from florence_onnx.runtime.providers import ProviderList

SessionOptions = Mapping[str, Any]
"""Attributes of `onnxruntime.SessionOptions` by name; a key with a dot is a session config entry."""

CPU = "CPUExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
CUDA_PROVIDERS = ("CUDAExecutionProvider", TENSORRT)
CUDA_GRAPHS = {"CUDAExecutionProvider": "enable_cuda_graph"}
"""The option that lets a provider capture CUDA graphs: one for each `gpu_graph_id`, and so for each binding."""
SINGLE_CUDA_GRAPH = "trt_cuda_graph_enable"
"""TensorRT's option for CUDA graphs. Its provider (ONNX Runtime 1.31) keeps one graph a session and does not read
`gpu_graph_id`: all bindings would replay the graph that the first one captured, on the buffers of the first one."""
LOG_ERRORS = 3
"""ONNX Runtime's log severity level for errors, without warnings."""
RECORD_NODES = "session.record_ep_graph_assignment_info"
"""Session config entry that records which provider takes which nodes (since ONNX Runtime 1.24)."""
FAULTY_FUSION = "SimplifiedLayerNormFusion"
"""An optimizer of ONNX Runtime. On a CPU that of 1.23 fails on layer normalisations that are written out and in fp16, as in
many published files, and says so with its own name in the name of a node; 1.22 and 1.32 do not."""
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
    """The module onnxruntime, from whichever of its packages is installed, without its reports (`telemetry`).

    Raises:
        MissingExtraError: None is installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "cpu") from error
    if telemetry.IS_TOO_LATE:
        _log.info("onnxruntime %s", telemetry.problem())
    module: ModuleType = ort
    return module


def default_session_options(provider: str) -> dict[str, Any]:
    """Default session options; for the measurements behind them see benchmarks/results/session_options.md.

    Args:
        provider: The first execution provider.
    """
    options: dict[str, Any] = {
        "intra_op_num_threads": cpu.num_cores(),
        "inter_op_num_threads": 1,
        # Otherwise the threads of one session still spin, waiting for work, while the next session runs: 1.30 s instead
        # of 1.15 s for 48 tokens of Florence-2-base in fp32 on two cores.
        "session.force_spinning_stop": "1",
        # Memory patterns save no time here, and Florence-2-base in fp32 peaks at 1580 MiB with them, 1376 without.
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
    cache_folder: Path | None,
) -> Any:
    """Opens a session.

    Args:
        ort: The module onnxruntime.
        path: The graph.
        chosen: Execution providers with their options.
        overrides: Session options that replace those of `default_session_options`.
        cache_folder: Folder of `graph_cache`, or None; only used with the CPU provider alone.

    Raises:
        InputError: An option is unknown or of a wrong type.
        BundleFileMissingError: External data is missing.
        CorruptGraphError: ONNX Runtime does not accept the graph.
        ProviderError: The first provider does not start, or does not accept the graph.
        DeviceMemoryError: There is not enough memory for the weights.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise InputError(f'session_options must be a dict such as {{"intra_op_num_threads": 2}}, got {overrides!r}')
    if chosen[0][0] in CUDA_PROVIDERS:
        cuda.preload(ort)
    settings = {**default_session_options(chosen[0][0]), **(overrides or {})}

    def create(file: Path, more: SessionOptions) -> Any:
        return _create_session(ort, file, chosen, _session_options(ort, {**settings, **more}))

    if cache_folder is None or [name for name, _ in chosen] != [CPU]:
        return create(path, {})
    no_optimization = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return graph_cache.load(
        path, cache_folder, settings, runtime=ort.__version__, no_optimization=no_optimization, create=create
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
    errors: tuple[type[Exception], ...] = (*raised_by(ort), MemoryError)
    if chosen[0][0] != CPU:  # a provider that does not start does not always raise one of ONNX Runtime's classes
        errors += (RuntimeError, ValueError)
    try:
        if chosen[0][0] in CUDA_PROVIDERS:
            # A CUDA kernel warns about duplicate indices at every ScatterND, whatever the session's own log level; the
            # indices of our graphs are distinct.
            ort.set_default_logger_severity(LOG_ERRORS)
        return _start_session(ort, path, chosen, options)
    except state.NoSuchFile as error:
        raise BundleFileMissingError(f"a file that {path} needs is missing: {error}") from error
    except errors as error:
        if is_out_of_memory(error):
            if chosen[0][0] != CPU:
                raise out_of_memory(chosen[0][0], error) from error
            raise memory_errors.error_for(chosen[0][0], path, error) from error
        if chosen[0][0] != CPU:
            reasons = _diagnosis(ort, chosen[0][0])
            raise ProviderError(f"{chosen[0][0]} could not load {path.name}: {error}{reasons}") from error
        if isinstance(error, state.NotImplemented):
            raise ProviderError(
                f"{path} is sound, but ONNX Runtime {ort.__version__} cannot run it on {chosen[0][0]}; choose another "
                f"precision of the model. ONNX Runtime says: {error}"
            ) from error
        raise CorruptGraphError(
            f"{path} does not load; export or download it again. ONNX Runtime says: {error}"
        ) from error


def _start_session(ort: ModuleType, path: Path, chosen: ProviderList, options: Any) -> Any:
    """Opens a session in spite of two faults: that of the file for which there is `graph_repair`, and `FAULTY_FUSION`."""

    def start(model: str | bytes, more: Mapping[str, Any]) -> Any:
        try:
            # enable_fallback=0: otherwise onnxruntime silently uses the CPU where a provider does not start.
            return ort.InferenceSession(model, options, providers=chosen, enable_fallback=0, **more)
        except raised_by(ort) as error:
            if graph_repair.REFUSED in str(error) and model == str(path):
                _log.info("%s has branches that return values of the outer graph: repaired in memory", path)
                return start(graph_repair.repair(path), more)
            if FAULTY_FUSION in str(error) and not more:
                _log.info("%s is loaded without %s, which fails", path, FAULTY_FUSION)
                return start(model, {"disabled_optimizers": [FAULTY_FUSION]})
            raise

    return start(str(path), {})


def raised_by(ort: ModuleType) -> tuple[type[Exception], ...]:
    """ONNX Runtime's exception classes, of those that the installed version has."""
    state = ort.capi.onnxruntime_pybind11_state
    return tuple(getattr(state, name) for name in _ERRORS if hasattr(state, name))


def out_of_memory(provider: str, error: BaseException) -> DeviceMemoryError:
    """Our error for one by which ONNX Runtime says that device memory is full."""
    return DeviceMemoryError(
        f"{provider} has not enough memory: {str(error).strip()}; a smaller max_batch, fewer beams or an fp16 bundle "
        "need less, and `florence-onnx info` tells how much"
    )


def check_provider(ort: ModuleType, obtained: Sequence[str], chosen: ProviderList) -> str:
    """Checks that a session runs on the provider that was asked for, and returns its name.

    Args:
        ort: The module onnxruntime.
        obtained: The session's providers.
        chosen: The providers that were asked for.

    Raises:
        ProviderError: It runs on another.
    """
    wanted = chosen[0][0]
    if obtained[0] != wanted:
        usual = "; usually the driver or a CUDA, cuDNN or TensorRT library is missing or of another major version"
        raise ProviderError(
            f"{wanted} was asked for but did not start (ONNX Runtime fell back to {', '.join(obtained)})"
            f"{_diagnosis(ort, wanted) or usual}"
        )
    return wanted


def _diagnosis(ort: ModuleType, provider: str) -> str:
    """Why a provider cannot start, as the end of a sentence; empty where no reason is found."""
    found = cuda.diagnose(str(getattr(ort, "cuda_version", ""))) if provider in CUDA_PROVIDERS else []
    if provider == TENSORRT:
        found += cuda.diagnose_tensorrt(ort)
    return f": {'; '.join(found)}" if found else ""


def count_nodes(session: Any) -> dict[str, int]:
    """Number of nodes by execution provider; empty before ONNX Runtime 1.24, and where `RECORD_NODES` is off."""
    if session.get_session_options().get_session_config_entry(RECORD_NODES) != "1":
        return {}
    counts: dict[str, int] = {}
    for part in getattr(session, "get_provider_graph_assignment_info", list)():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def report_nodes(path: Path, provider: str, nodes: Mapping[str, int]) -> None:
    """Logs how many nodes a provider does not take, and which providers take them."""
    left = {name: count for name, count in nodes.items() if name != provider}
    if left:
        rest = ", ".join(f"{count} to {name}" for name, count in left.items())
        _log.info("%s: %s takes %d nodes and leaves %s", path.name, provider, nodes.get(provider, 0), rest)
