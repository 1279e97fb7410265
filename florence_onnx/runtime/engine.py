"""Running one graph: the `Engine` protocol, and its implementation on ONNX Runtime."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx import forks
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
from florence_onnx.runtime.providers import BF16
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
"""Run config entry `gpu_graph_id` of a run that neither captures nor replays; the default, 0, is a valid id."""
_log = logging.getLogger("florence_onnx")


class Binding(Protocol):
    """Buffers bound to a graph's inputs and outputs, for repeated runs without allocation."""

    def bind_input(self, name: str, array: Array) -> None:
        """Lets the graph read `array` (C-contiguous, of the input's dtype) at every run."""

    def bind_output(self, name: str, array: Array) -> None:
        """Lets the graph write to `array` at every run; a tensor that is bound as input too is updated in place."""

    def run(self) -> None:
        """Runs the graph once, on what the buffers hold now."""


class Engine(Protocol):
    """One loaded graph; may be used from several threads at once."""

    @property
    def inputs(self) -> Mapping[str, np.dtype[Any]]:
        """Name and dtype of every input."""

    @property
    def num_runs(self) -> int:
        """How often the graph was run."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph on host arrays, cast to its dtypes where they differ, and returns all outputs by name."""

    def bind(self) -> Binding:
        """A new binding without buffers, to be used by one thread at a time."""


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
            path: An ONNX file, with its external data beside it.
            options: Device, execution providers and their options; `max_batch` is ignored.
            expected_inputs: Names that must be among the graph's inputs.
            cuda_graphs: Whether bindings capture CUDA graphs if the provider can; `provider_options` override this.

        Raises:
            BundleFileMissingError: There is no such file.
            CorruptGraphError: ONNX Runtime does not accept the file or its external data, or it is another graph than
                expected.
            InputError: A provider option would lead to wrong answers.
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
            precision=BF16 if options.is_bf16 else None,
            num_threads=cpu.num_cores(),
        )
        _refuse_single_graph(chosen)
        self._ort = ort
        self._lock = forks.Lock()
        self._num_running = 0
        self._graph_ids = itertools.count(1)
        name = CUDA_GRAPHS.get(chosen[0][0], "")
        if cuda_graphs and name:
            chosen[0][1].setdefault(name, "1")
        self.can_capture = _is_on(chosen[0][1].get(name))
        """Whether bindings may capture CUDA graphs."""
        self.capture_error = ""
        """Why they may not, where capturing was asked for and failed."""
        # A capture fails if another thread of the process calls CUDA meanwhile, as opening a session does.
        self._exclusive = LOCK if chosen[0][0] in CUDA_PROVIDERS else contextlib.nullcontext()
        # not `self._open` with its arguments: that refers to the engine, so that its memory would wait for the collector
        self._source = path, chosen, options.session_options, options.graph_cache_folder
        with self._exclusive:
            self._session: Any = self._open(*self._source)
        # Stays true when capture is disabled later: the session still has CUDA graphs enabled, and would capture a run
        # without an id as graph 0 and replay it for other buffers.
        self._needs_graph_id = self.can_capture
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
        """Shapes by name; an axis without a fixed size is its name."""
        self.shapes: dict[str, list[int | str]] = {node.name: list(node.shape) for node in nodes} | self.output_shapes
        """The same of inputs and outputs."""
        self._num_runs = 0
        forks.call_in_child(self._drop_session_in_child)

    def _open(
        self,
        path: Path,
        chosen: provider_presets.ProviderList,
        session_options: SessionOptions | None,
        cache_folder: Path | None,
    ) -> Any:
        """Opens the session; without CUDA graphs where ONNX Runtime cannot capture this one."""
        try:
            return open_session(self._ort, path, chosen, session_options, cache_folder)
        except ProviderError as error:
            if not self.can_capture or "graph" not in str(error).lower():
                raise
            chosen[0][1][CUDA_GRAPHS[chosen[0][0]]] = "0"
            session = open_session(self._ort, path, chosen, session_options, cache_folder)
            self.disable_capture(path.name, error)
            return session

    @property
    def session(self) -> Any:
        """The ONNX Runtime session; opened again at the first use in a forked child, if it cannot be used there.

        Raises:
            ProviderError: A child was forked from a process that has this graph on another device than the CPU.
            BundleError: A file of the graph has been deleted or changed since.
        """
        if self._session is None:
            if self.provider != CPU:
                raise ProviderError(forks.UNUSABLE.format(self.provider))
            with self._lock:
                if self._session is None:
                    self._session = self._open(*self._source)
        return self._session

    def _drop_session_in_child(self) -> None:
        """Drops the session in a forked child, except where it has no threads and no thread was running it.

        ONNX Runtime 1.32, tried: a session without threads works in a child. One with threads waits for them in its
        destructor, and so does the child's exit. A thread in the middle of a run may have taken the arena's lock.
        """
        settings = self._session and self._session.get_session_options()
        is_usable = (
            settings is not None
            and self.provider == CPU
            and settings.intra_op_num_threads == settings.inter_op_num_threads == 1
            and not self._num_running
        )
        self._num_running = 0
        if not is_usable:
            forks.leak(self._session)
            self._session = None

    def disable_capture(self, name: str, reason: BaseException) -> None:
        """Makes all bindings run without CUDA graphs from now on, and logs why.

        Args:
            name: What is logged as running without a CUDA graph.
            reason: The error of the capture.
        """
        self.can_capture = False
        self.capture_error = str(reason)
        _log.warning("%s runs without a CUDA graph, which is slower at every step: %s", name, reason)

    def new_graph_id(self) -> int:
        """A `gpu_graph_id` that this session has not used yet: two bindings must never share one."""
        return next(self._graph_ids)

    @property
    def computes_on_host(self) -> bool:
        """Whether kernels read and write host memory directly."""
        return self.provider in HOST_PROVIDERS

    @property
    def updates_in_place(self) -> bool:
        """Whether an output may be bound to an input's memory: TensorRT may write it before it has read the input."""
        return self.provider != "TensorrtExecutionProvider"

    @cached_property
    def memory(self) -> DeviceMemory:
        """The memory that the graph's kernels use.

        Raises:
            ProviderError: CUDA's runtime library is not found.
        """
        if self.provider not in CUDA_PROVIDERS:
            return HostMemory()
        return CudaMemory(str(getattr(self._ort, "cuda_version", "")), self._device_index)

    @property
    def num_runs(self) -> int:
        return self._num_runs

    def count_run(self) -> None:
        """Counts a run, from any thread."""
        with self._lock:
            self._num_runs += 1

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        typed = {name: np.ascontiguousarray(value, dtype=self.inputs[name]) for name, value in feeds.items()}
        self.count_run()
        options = self.run_options()
        outputs = self.call(partial(self.session.run, None, typed, options))
        return dict(zip(self.outputs, outputs, strict=True))

    def run_options(self, graph_id: str = NO_CAPTURE) -> Any:
        """The `RunOptions` of a run; None for a session without CUDA graphs, which needs none.

        Args:
            graph_id: Id of the CUDA graph that the run captures, or replays if there is one; `NO_CAPTURE` for neither.
        """
        if not self._needs_graph_id:
            return None
        options = self._ort.RunOptions()
        options.add_run_config_entry("gpu_graph_id", graph_id)
        return options

    def call(self, function: Callable[[], Any]) -> Any:
        """Calls a function of ONNX Runtime's, alone on the GPU if there is one, and translates its errors into ours.

        Raises:
            DeviceMemoryError: There is not enough memory; all that was allocated before is still there.
            ProviderError: The provider failed.
        """
        # A failing kernel raises one of ONNX Runtime's classes in `run`, a bare RuntimeError in `run_with_iobinding`.
        expected: tuple[type[Exception], ...] = (*raised_by(self._ort), RuntimeError, MemoryError)
        self._count_running(1)
        try:
            with self._exclusive:
                return function()
        except expected as error:
            if is_out_of_memory(error):
                raise out_of_memory(self.provider, error) from error
            raise ProviderError(f"{self.provider} failed while running: {str(error).strip()}") from error
        finally:
            self._count_running(-1)

    def _count_running(self, change: int) -> None:
        with self._lock:
            self._num_running += change

    def bind(self) -> OnnxBinding:
        return OnnxBinding(self, self.session)


class OnnxBinding:
    """A `Binding` to buffers on the host or on a device; on a GPU its runs can be captured as one CUDA graph."""

    def __init__(self, engine: OnnxEngine, session: Any) -> None:
        self._engine = engine
        self._session = session
        self._binding = session.io_binding()
        # ONNX Runtime is given bare addresses; these references keep the memory alive.
        self._arrays: dict[str, Array | DeviceArray] = {}
        # Inputs on the host of a provider that computes elsewhere: copied to the device at every run.
        self._host_inputs: dict[str, Array] = {}
        self._graph_id: int | None = None
        self._options = engine.run_options()

    def bind_input(self, name: str, array: Array | DeviceArray) -> None:
        self._arrays[f"input {name}"] = array
        self._host_inputs.pop(name, None)
        if isinstance(array, DeviceArray) or self._engine.computes_on_host:
            self._binding.bind_input(name, *_location(array))
        else:
            self._host_inputs[name] = array

    def bind_output(self, name: str, array: Array | DeviceArray) -> None:
        self._arrays[f"output {name}"] = array
        self._binding.bind_output(name, *_location(array))

    def capture(self) -> None:
        """Lets the next run capture a CUDA graph, if the engine can, and later runs replay it; nothing may be rebound."""
        if self._engine.can_capture:
            self._graph_id = self._engine.new_graph_id()
            self._options = self._engine.run_options(str(self._graph_id))

    def release(self) -> None:
        """Releases the captured graph; no run may follow."""
        if self._graph_id is not None and hasattr(self._session, "release_captured_graph"):
            release, graph_id = self._session.release_captured_graph, self._graph_id
            self._engine.call(lambda: release(graph_id))
        self._graph_id = None

    def run(self) -> None:
        """Runs the graph once, on what the buffers hold now; without a CUDA graph where it cannot be captured.

        Raises:
            DeviceMemoryError: There is not enough device memory; all that was allocated before is still there.
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
            self._run()  # raises again if capturing was not the reason
            self._engine.disable_capture("a graph", error)

    def _run(self) -> None:
        if not self._engine.can_capture and self._graph_id is not None:  # the capture of another binding failed
            self._graph_id, self._options = None, self._engine.run_options()
        self._engine.call(self._copy_inputs_and_run)

    def _copy_inputs_and_run(self) -> None:
        # ONNX Runtime copies a host input to the device when it is bound, and not again when it is run.
        for name, array in self._host_inputs.items():
            self._binding.bind_input(name, *_location(array))
        self._session.run_with_iobinding(self._binding, self._options)


def _is_on(option: Any) -> bool:
    return str(option) in ("1", "True", "true")


def _refuse_single_graph(chosen: provider_presets.ProviderList) -> None:
    """Raises InputError where a session would capture one of its bindings and replay that graph for all others."""
    if any(_is_on(options.get(SINGLE_CUDA_GRAPH)) for _, options in chosen):
        raise InputError(
            f"{SINGLE_CUDA_GRAPH} cannot be used: ONNX Runtime's TensorRT provider keeps one CUDA graph a session, and would "
            "replay it for inputs of other shapes and addresses; leave it out"
        )


def _location(array: Array | DeviceArray) -> tuple[str, int, Any, tuple[int, ...], int]:
    """Arguments of `bind_input` and `bind_output` of ONNX Runtime: device, its number, dtype, shape, address."""
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
    """Loads the graphs of a model; on the CPU in parallel.

    To create a session keeps one thread busy, without Python's global lock (ONNX Runtime 1.32; 1.24 holds the lock, so
    that there is no gain). Florence-2-base in fp32 on two cores: 1.3 s instead of 2.2 s.

    Args:
        paths: ONNX files.
        expected_inputs: For each file, names that must be among the graph's inputs.
        options: As for `OnnxEngine`.
        cuda_graphs: As for `OnnxEngine`.

    Raises:
        FlorenceError: As `OnnxEngine`, for the first graph that does not load.
    """
    from concurrent.futures import ThreadPoolExecutor

    # The last graph first: it is the decoder, and to open its session needs the most memory beyond the weights.
    pairs = list(zip(paths, expected_inputs, strict=True))[::-1]
    # One after the other on accelerators: building engines in parallel would multiply the peak of device memory.
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
            f"{path} is another graph than expected: input {wrong[0]} is missing or of another type (its inputs are {found}); "
            "export or download it again"
        )
