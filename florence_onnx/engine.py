"""Running one graph: the `Engine` protocol and ONNX Runtime behind it."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx import cpu, cuda, graph_cache
from florence_onnx import providers as provider_presets
from florence_onnx.cudart import CudaRuntime
from florence_onnx.device_memory import DeviceArray, DeviceMemory, copy_rows_on_host
from florence_onnx.errors import (
    BundleFileMissingError,
    CorruptGraphError,
    DeviceMemoryError,
    InputError,
    MissingExtraError,
    ProviderError,
)
from florence_onnx.memory import is_out_of_memory
from florence_onnx.providers import Options, Provider

Array = npt.NDArray[Any]
SessionOptions = Mapping[str, Any]
"""Attributes of `onnxruntime.SessionOptions` by name; a key with a dot is a session config entry."""

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
CPU = "CPUExecutionProvider"
CUDA_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
CUDA_GRAPHS = {"CUDAExecutionProvider": "enable_cuda_graph", "TensorrtExecutionProvider": "trt_cuda_graph_enable"}
"""The provider option that lets a session capture CUDA graphs."""
NO_CAPTURE = "-1"
"""Run config entry `gpu_graph_id` of a run that is neither captured nor replayed."""
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


class Binding(Protocol):
    """Buffers tied to a graph's inputs and outputs, for repeated runs without allocation."""

    def bind_input(self, name: str, array: Array) -> None:
        """The graph reads `array` (C-contiguous, of the input's dtype) at every run."""

    def bind_output(self, name: str, array: Array) -> None:
        """The graph writes to `array`; an output may share its buffer with an input to be updated in place."""

    def run(self) -> None:
        """Runs the graph once on the present content of the buffers."""


class Engine(Protocol):
    """One graph, ready to run; safe to use from several threads."""

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        """Name and dtype of every input."""

    @property
    def num_runs(self) -> int:
        """How often the graph ran."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph; feeds are cast to the graph's dtypes where they differ."""

    def bind(self) -> Binding:
        """A fresh set of buffers, for use by one thread."""


class OnnxEngine:
    """A graph in an ONNX Runtime session."""

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        providers: Sequence[Provider] | None = None,
        provider_options: Options | None = None,
        precision: str | None = None,
        session_options: SessionOptions | None = None,
        kept: Path | None = None,
        expected_inputs: Sequence[str] = (),
        cuda_graphs: bool = False,
    ) -> None:
        """Loads a graph.

        Args:
            path: An ONNX file; external data lies beside it.
            device: See `florence_onnx.providers.Device`.
            providers: Explicit execution providers, instead of `device`.
            provider_options: Options of the device's provider, over the preset's.
            precision: `"bf16"` asks the provider to compute in it.
            session_options: Overrides of `default_session_options`.
            kept: Folder of `graph_cache`, used with the CPU provider alone; None does without.
            expected_inputs: Names that must be among the graph's inputs.
            cuda_graphs: Whether bindings may capture CUDA graphs, on a card; `provider_options` have the last word.

        Raises:
            BundleFileMissingError: There is no such file.
            CorruptGraphError: The file, or its external data, is not a graph that ONNX Runtime accepts, or it is another
                graph than expected.
            ProviderError: The execution provider did not start.
        """
        ort = onnxruntime()
        if not path.is_file():
            raise BundleFileMissingError(f"graph file {path} is missing; export or download the bundle again")
        chosen = provider_presets.resolve(
            device,
            providers,
            ort.get_available_providers(),
            provider_options=provider_options,
            precision=precision,
            num_threads=cpu.num_cores(),
        )
        self._ort = ort
        self._lock = threading.Lock()
        self._graph_ids = itertools.count(1)
        name = CUDA_GRAPHS.get(chosen[0][0], "")
        if cuda_graphs and name:
            chosen[0][1].setdefault(name, "1")
        self.captures = str(chosen[0][1].get(name, "0")) in ("1", "True", "true")
        """Whether bindings may become CUDA graphs."""
        self.capture_refusal = ""
        """Why not, where it was wanted."""
        self._session = self._open(path, chosen, session_options, kept)
        self._device_index = int(chosen[0][1].get("device_id", 0))
        self.provider: str = _check_provider(ort, self._session.get_providers(), chosen)
        self.nodes: Mapping[str, int] = _count_nodes(self._session) if self.provider != CPU else {}
        _report_nodes(path, self.provider, self.nodes)
        nodes = self._session.get_inputs()
        _check_interface(path, {node.name: node.type for node in nodes}, expected_inputs)
        self.inputs: dict[str, np.dtype[Any]] = {node.name: np.dtype(_DTYPES[node.type]) for node in nodes}
        self.outputs: list[str] = [node.name for node in self._session.get_outputs()]
        self.output_shapes: dict[str, list[int | str]] = {
            node.name: list(node.shape) for node in self._session.get_outputs()
        }
        """By name; axes without a fixed size by their names."""
        self._num_runs = 0

    def _open(
        self,
        path: Path,
        chosen: provider_presets.ProviderList,
        session_options: SessionOptions | None,
        kept: Path | None,
    ) -> Any:
        """Opens the session; without CUDA graphs where ONNX Runtime refuses to capture this one."""
        try:
            return _open_session(self._ort, path, chosen, session_options, kept)
        except ProviderError as error:
            if not self.captures or "graph" not in str(error).lower():
                raise
            chosen[0][1][CUDA_GRAPHS[chosen[0][0]]] = "0"
            session = _open_session(self._ort, path, chosen, session_options, kept)
            self.refuse_capture(path.name, error)
            return session

    def refuse_capture(self, what: str, reason: BaseException) -> None:
        """Goes on without CUDA graphs, and says so."""
        self.captures = False
        self.capture_refusal = str(reason)
        _log.warning("%s runs without a CUDA graph, which costs time at every step: %s", what, reason)

    def new_graph_id(self) -> int:
        """A number for a CUDA graph of this session."""
        return next(self._graph_ids)

    @property
    def updates_in_place(self) -> bool:
        """Whether an output may be bound to an input's memory: an engine of TensorRT's does not promise to read first."""
        return self.provider != "TensorrtExecutionProvider"

    @cached_property
    def memory(self) -> DeviceMemory:
        """Where the graph's buffers are best."""
        runtime = self.cuda_runtime
        if runtime is None:
            return DeviceMemory(self._ort, "cpu", 0, copy_rows_on_host, self.guarded)
        return DeviceMemory(self._ort, "cuda", self._device_index, runtime.copy_rows, self.guarded)

    @cached_property
    def cuda_runtime(self) -> CudaRuntime | None:
        """CUDA's runtime library; None for a provider that does not run on a card.

        Raises:
            ProviderError: It is not there.
        """
        if self.provider not in CUDA_PROVIDERS:
            return None
        return CudaRuntime(str(self._ort.cuda_version), self._device_index)

    @property
    def num_runs(self) -> int:
        return self._num_runs

    def count_run(self) -> None:
        """Counts a run, whichever thread it is on."""
        with self._lock:
            self._num_runs += 1

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        typed = {name: np.ascontiguousarray(value, dtype=self.inputs[name]) for name, value in feeds.items()}
        self.count_run()
        options = self.run_options()
        outputs = self.guarded(lambda: self._session.run(None, typed, options))
        return dict(zip(self.outputs, outputs, strict=True))

    def run_options(self, graph_id: str = NO_CAPTURE) -> Any:
        """`RunOptions` for a CUDA graph; None where there are none, since other providers need none."""
        if not self.captures:
            return None
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph_id)
        return options

    def guarded(self, run: Callable[[], Any]) -> Any:
        """Calls ONNX Runtime, and gives what a device raises our names.

        Raises:
            DeviceMemoryError: There is not enough memory; all that was allocated before is still there.
            ProviderError: The provider failed.
        """
        # a failing kernel is a bare RuntimeError where buffers are bound, and one of ONNX Runtime's classes where not
        try:
            return run()
        except (*_errors(self._ort), RuntimeError) as error:
            if is_out_of_memory(error):
                raise DeviceMemoryError(
                    f"{self.provider} has not enough memory: {error}; a smaller max_batch, fewer beams or an fp16 bundle "
                    "need less, and `florence-onnx info` tells how much"
                ) from error
            if self.provider == CPU:
                raise
            raise ProviderError(f"{self.provider} failed while running: {error}") from error

    def bind(self) -> OnnxBinding:
        return OnnxBinding(self, self._session)


class OnnxBinding:
    """Buffers on the host or on a device, as `Binding`; on a card its runs may be one CUDA graph."""

    def __init__(self, engine: OnnxEngine, session: Any) -> None:
        self._engine = engine
        self._session = session
        self._binding = session.io_binding()
        self._arrays: dict[str, Array | DeviceArray] = {}  # the session holds bare addresses: these must live as long
        self._graph_id: int | None = None
        self._options = engine.run_options()

    def bind_input(self, name: str, array: Array | DeviceArray) -> None:
        self._arrays[f"input {name}"] = array
        self._binding.bind_input(name, *_place(array))

    def bind_output(self, name: str, array: Array | DeviceArray) -> None:
        self._arrays[f"output {name}"] = array
        self._binding.bind_output(name, *_place(array))

    def capture(self) -> None:
        """Makes the runs from now on one CUDA graph, if the engine captures any; the buffers stay what and where they are."""
        if self._engine.captures:
            self._graph_id = self._engine.new_graph_id()
            self._options = self._engine.run_options(str(self._graph_id))

    def release(self) -> None:
        """Forgets the CUDA graph; no more runs."""
        if self._graph_id is not None and hasattr(self._session, "release_captured_graph"):
            self._session.release_captured_graph(self._graph_id)
        self._graph_id = None

    def run(self) -> None:
        """Runs the graph once on the present content of the buffers; where that cannot be captured, without a CUDA graph.

        Raises:
            DeviceMemoryError: The device has not enough memory; what was allocated before is still there.
            ProviderError: The provider failed.
        """
        self._engine.count_run()
        try:
            self._run()
        except DeviceMemoryError:
            raise
        except ProviderError as error:
            if self._graph_id is None:
                raise
            self._graph_id, self._options = None, self._engine.run_options()
            self._run()  # raises if the graph was not the reason
            self._engine.refuse_capture("a graph", error)

    def _run(self) -> None:
        if not self._engine.captures and self._graph_id is not None:  # another binding was refused
            self._graph_id, self._options = None, self._engine.run_options()
        self._engine.guarded(lambda: self._session.run_with_iobinding(self._binding, self._options))


def _place(array: Array | DeviceArray) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Where a tensor is, as `io_binding` takes it: device, its number, dtype, shape, address."""
    if isinstance(array, DeviceArray):
        memory = array.memory
        return memory.device, memory.index, array.dtype.type, array.shape, array.address
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


def load_engines(paths: Sequence[Path], expected_inputs: Sequence[Sequence[str]], **arguments: Any) -> list[OnnxEngine]:
    """Loads the graphs of a model, those for a CPU at the same time.

    Creating a session is work of one thread without Python's lock (ONNX Runtime 1.32; 1.24 holds the lock, and then
    nothing is won). Florence-2-base in fp32 on two cores: 1.3 s instead of 2.2 s.

    Args:
        paths: ONNX files.
        expected_inputs: For each, names that must be among its inputs.
        arguments: The others of `OnnxEngine`.

    Raises:
        FlorenceError: As `OnnxEngine`, of the first graph that does not load.
    """
    from concurrent.futures import ThreadPoolExecutor

    # The last graph first: it is the decoder, whose start needs the most memory beyond what it keeps.
    pairs = list(zip(paths, expected_inputs, strict=True))[::-1]
    # Accelerators one by one: building their engines side by side would take their memory several times.
    num_workers = len(pairs) if is_for_cpu(arguments) else 1
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [pool.submit(OnnxEngine, path, expected_inputs=names, **arguments) for path, names in pairs]
    return [future.result() for future in futures[::-1]]


def is_for_cpu(arguments: Mapping[str, Any]) -> bool:
    """Whether `OnnxEngine` with these arguments runs on ONNX Runtime's own CPU provider."""
    providers = arguments.get("providers")
    return arguments.get("device") == "cpu" if providers is None else list(providers) == [CPU]


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


def _open_session(
    ort: ModuleType,
    path: Path,
    chosen: provider_presets.ProviderList,
    overrides: SessionOptions | None,
    kept: Path | None,
) -> Any:
    if overrides is not None and not isinstance(overrides, Mapping):
        raise InputError(f'session_options must be a dict such as {{"intra_op_num_threads": 2}}, got {overrides!r}')
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
    options.log_severity_level = 3
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


def _create_session(ort: ModuleType, path: Path, chosen: provider_presets.ProviderList, options: Any) -> Any:
    state = ort.capi.onnxruntime_pybind11_state
    errors = _errors(ort)
    if chosen[0][0] != CPU:  # what the start of a GPU provider raises is not always one of ONNX Runtime's own classes
        errors += (RuntimeError, ValueError)
    try:
        # enable_fallback=0: a provider that does not start must not become the CPU behind the caller's back
        return ort.InferenceSession(str(path), options, providers=chosen, enable_fallback=0)
    except state.NoSuchFile as error:
        raise BundleFileMissingError(f"a file that {path} needs is missing: {error}") from error
    except errors as error:
        if chosen[0][0] != CPU:
            missing = _obstacles(ort, chosen[0][0])
            raise ProviderError(f"{chosen[0][0]} could not take {path.name}: {error}{missing}") from error
        raise CorruptGraphError(
            f"{path} does not load; export or download it again. ONNX Runtime says: {error}"
        ) from error


def _errors(ort: ModuleType) -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises."""
    state = ort.capi.onnxruntime_pybind11_state
    return tuple(getattr(state, name) for name in _ERRORS if hasattr(state, name))


def _check_interface(path: Path, types: Mapping[str, str], expected: Sequence[str]) -> None:
    wrong = [name for name in expected if name not in types] or [n for n, kind in types.items() if kind not in _DTYPES]
    if wrong:
        found = ", ".join(f"{name} {kind}" for name, kind in types.items())
        raise CorruptGraphError(
            f"{path} is not the graph it should be: input {wrong[0]} is missing or of another type (it takes {found}); "
            "export or download it again"
        )


def _check_provider(ort: ModuleType, obtained: Sequence[str], chosen: provider_presets.ProviderList) -> str:
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
    return f": {'; '.join(found)}" if found else ""


def _count_nodes(session: Any) -> dict[str, int]:
    """Nodes by execution provider; empty where ONNX Runtime cannot tell (before 1.24, or `RECORD_NODES` off)."""
    if session.get_session_options().get_session_config_entry(RECORD_NODES) != "1":
        return {}
    counts: dict[str, int] = {}
    for part in getattr(session, "get_provider_graph_assignment_info", list)():
        counts[part.ep_name] = counts.get(part.ep_name, 0) + len(part.get_nodes())
    return counts


def _report_nodes(path: Path, provider: str, nodes: Mapping[str, int]) -> None:
    left = {name: count for name, count in nodes.items() if name != provider}
    if left:
        rest = ", ".join(f"{count} to {name}" for name, count in left.items())
        _log.info("%s: %s takes %d nodes and leaves %s", path.name, provider, nodes.get(provider, 0), rest)
