"""Running one graph: the `Engine` protocol and ONNX Runtime behind it."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.bundles.memory import is_out_of_memory
from florence_onnx.errors import (
    BundleFileMissingError,
    CorruptGraphError,
    DeviceMemoryError,
    InputError,
    ProviderError,
)
from florence_onnx.runtime import cpu
from florence_onnx.runtime import providers as provider_presets
from florence_onnx.runtime.cuda_memory import LOCK, CudaMemory
from florence_onnx.runtime.device_memory import DeviceArray, DeviceMemory, HostMemory
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.runtime.sessions import (
    CPU,
    CUDA_GRAPHS,
    CUDA_PROVIDERS,
    SINGLE_CUDA_GRAPH,
    SessionOptions,
    check_provider,
    count_nodes,
    onnxruntime,
    open_session,
    out_of_memory,
    raised_by,
    report_nodes,
)

Array = npt.NDArray[Any]

_DTYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}
HOST_PROVIDERS = (CPU, "OpenVINOExecutionProvider")
NO_CAPTURE = "-1"
"""Run config entry `gpu_graph_id` of a run that is neither captured nor replayed."""
_log = logging.getLogger("florence_onnx")


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
        options: LoadOptions | None = None,
        *,
        expected_inputs: Sequence[str] = (),
        cuda_graphs: bool = False,
    ) -> None:
        """Loads a graph.

        Args:
            path: An ONNX file; external data lies beside it.
            options: Device, execution providers and their options; `max_batch` is not for a single graph.
            expected_inputs: Names that must be among the graph's inputs.
            cuda_graphs: Whether bindings may capture CUDA graphs, on a card; `provider_options` have the last word.

        Raises:
            BundleFileMissingError: There is no such file.
            CorruptGraphError: The file, or its external data, is not a graph that ONNX Runtime accepts, or it is another
                graph than expected.
            InputError: A provider option would make answers wrong.
            ProviderError: The execution provider did not start.
        """
        options = options or LoadOptions()
        ort = onnxruntime()
        if not path.is_file():
            raise BundleFileMissingError(f"graph file {path} is missing; export or download the bundle again")
        chosen = provider_presets.resolve(
            options.device,
            options.providers,
            ort.get_available_providers(),
            provider_options=options.provider_options,
            precision=options.precision,
            num_threads=cpu.num_cores(),
        )
        _refuse_single_graph(chosen)
        self._ort = ort
        self._lock = threading.Lock()
        self._graph_ids = itertools.count(1)
        name = CUDA_GRAPHS.get(chosen[0][0], "")
        if cuda_graphs and name:
            chosen[0][1].setdefault(name, "1")
        self.captures = _is_on(chosen[0][1].get(name))
        """Whether bindings may become CUDA graphs."""
        self.capture_refusal = ""
        """Why not, where it was wanted."""
        # while one thread captures a CUDA graph, or takes memory for weights, no other may call CUDA
        self._exclusive = LOCK if chosen[0][0] in CUDA_PROVIDERS else contextlib.nullcontext()
        with self._exclusive:
            self._session = self._open(path, chosen, options.session_options, options.graph_cache_folder)
        self._names_graphs = self.captures
        self._device_index = int(chosen[0][1].get("device_id", 0))
        self.provider: str = check_provider(ort, self._session.get_providers(), chosen)
        self.nodes: Mapping[str, int] = count_nodes(self._session) if self.provider != CPU else {}
        report_nodes(path, self.provider, self.nodes)
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
            return open_session(self._ort, path, chosen, session_options, kept)
        except ProviderError as error:
            if not self.captures or "graph" not in str(error).lower():
                raise
            chosen[0][1][CUDA_GRAPHS[chosen[0][0]]] = "0"
            session = open_session(self._ort, path, chosen, session_options, kept)
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
    def computes_on_host(self) -> bool:
        """Whether kernels read the host's memory where it is."""
        return self.provider in HOST_PROVIDERS

    @property
    def updates_in_place(self) -> bool:
        """Whether an output may be bound to an input's memory: an engine of TensorRT's does not promise to read first."""
        return self.provider != "TensorrtExecutionProvider"

    @cached_property
    def memory(self) -> DeviceMemory:
        """Where the graph's buffers are best.

        Raises:
            ProviderError: CUDA's runtime library is not there.
        """
        if self.provider not in CUDA_PROVIDERS:
            return HostMemory()
        return CudaMemory(str(getattr(self._ort, "cuda_version", "")), self._device_index)

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
        """`RunOptions` for a CUDA graph; None for a session that never captures, and that needs to be told nothing."""
        if not self._names_graphs:
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
        expected: tuple[type[Exception], ...] = (*raised_by(self._ort), RuntimeError, MemoryError)
        try:
            with self._exclusive:
                return run()
        except expected as error:
            if is_out_of_memory(error):
                raise out_of_memory(self.provider, error) from error
            if self.provider == CPU:
                raise
            raise ProviderError(f"{self.provider} failed while running: {str(error).strip()}") from error

    def bind(self) -> OnnxBinding:
        return OnnxBinding(self, self._session)


class OnnxBinding:
    """Buffers on the host or on a device, as `Binding`; on a card its runs may be one CUDA graph."""

    def __init__(self, engine: OnnxEngine, session: Any) -> None:
        self._engine = engine
        self._session = session
        self._binding = session.io_binding()
        self._arrays: dict[str, Array | DeviceArray] = {}  # the session holds bare addresses: these must live as long
        self._sent: dict[str, Array] = {}  # inputs that each run takes from the host to a device of its own memory
        self._graph_id: int | None = None
        self._options = engine.run_options()

    def bind_input(self, name: str, array: Array | DeviceArray) -> None:
        self._arrays[f"input {name}"] = array
        self._sent.pop(name, None)
        if isinstance(array, DeviceArray) or self._engine.computes_on_host:
            self._binding.bind_input(name, *_place(array))
        else:
            self._sent[name] = array

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
            release, graph_id = self._session.release_captured_graph, self._graph_id
            self._engine.guarded(lambda: release(graph_id))
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
        self._engine.guarded(self._send_and_run)

    def _send_and_run(self) -> None:
        for name, array in self._sent.items():  # ONNX Runtime copies a host input when it is bound, and never again
            self._binding.bind_input(name, *_place(array))
        self._session.run_with_iobinding(self._binding, self._options)


def _is_on(option: Any) -> bool:
    return str(option) in ("1", "True", "true")


def _refuse_single_graph(chosen: provider_presets.ProviderList) -> None:
    """Raises InputError where a session would capture the first of its bindings and replay that for all others."""
    if any(_is_on(options.get(SINGLE_CUDA_GRAPH)) for _, options in chosen):
        raise InputError(
            f"{SINGLE_CUDA_GRAPH} cannot be used: ONNX Runtime's TensorRT provider keeps one CUDA graph a session, and would "
            "replay it for inputs of other shapes and addresses; leave it out"
        )


def _place(array: Array | DeviceArray) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Where a tensor is, as `io_binding` takes it: device, its number, dtype, shape, address."""
    if isinstance(array, DeviceArray):
        memory = array.memory
        return memory.device, memory.index, array.dtype.type, array.shape, array.address
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data


def load_engines(
    paths: Sequence[Path],
    expected_inputs: Sequence[Sequence[str]],
    options: LoadOptions | None = None,
    *,
    cuda_graphs: bool = False,
) -> list[OnnxEngine]:
    """Loads the graphs of a model, those for a CPU at the same time.

    Creating a session is work of one thread without Python's lock (ONNX Runtime 1.32; 1.24 holds the lock, and then
    nothing is won). Florence-2-base in fp32 on two cores: 1.3 s instead of 2.2 s.

    Args:
        paths: ONNX files.
        expected_inputs: For each, names that must be among its inputs.
        options: As for `OnnxEngine`.
        cuda_graphs: As for `OnnxEngine`.

    Raises:
        FlorenceError: As `OnnxEngine`, of the first graph that does not load.
    """
    from concurrent.futures import ThreadPoolExecutor

    # The last graph first: it is the decoder, whose start needs the most memory beyond what it keeps.
    pairs = list(zip(paths, expected_inputs, strict=True))[::-1]
    # Accelerators one by one: building their engines side by side would take their memory several times.
    num_workers = len(pairs) if options is not None and options.is_for_cpu else 1
    with ThreadPoolExecutor(num_workers) as pool:
        futures = [
            pool.submit(OnnxEngine, path, options, expected_inputs=names, cuda_graphs=cuda_graphs)
            for path, names in pairs
        ]
    return [future.result() for future in futures[::-1]]


def _check_interface(path: Path, types: Mapping[str, str], expected: Sequence[str]) -> None:
    wrong = [name for name in expected if name not in types] or [n for n, kind in types.items() if kind not in _DTYPES]
    if wrong:
        found = ", ".join(f"{name} {kind}" for name, kind in types.items())
        raise CorruptGraphError(
            f"{path} is not the graph it should be: input {wrong[0]} is missing or of another type (it takes {found}); "
            "export or download it again"
        )
