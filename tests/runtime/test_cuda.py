"""Calls to NVIDIA's libraries: with fakes, and with the CUDA stub where the CUDA provider is installed."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import DeviceMemoryError, Florence2, ProviderError
from florence_onnx.bundles import bundle
from florence_onnx.runtime import cuda, engine
from florence_onnx.runtime.cuda import Gpu
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine
from florence_onnx.runtime.load_options import LoadOptions
from tests.cuda import cuda_stub

ROOT = Path(__file__).parents[2]
needs_stub = pytest.mark.skipif(bool(cuda_stub.unavailable()), reason=cuda_stub.unavailable() or "never")


def under_stub(code: str, memory: int | None = None) -> Any:
    """Runs code in a process with the CUDA stub, and returns what it prints as JSON."""
    return cuda_stub.run("-c", code, memory=memory)


# ---------------------------------------------------------------------------------------------- hardware and versions


class Driver:
    """`libcuda` of a machine with one GPU."""

    def __init__(self, status: int = 0) -> None:
        self.status = status

    def cuInit(self, flags: int) -> int:  # noqa: N802 - CUDA's name, as those below
        return self.status

    def cuDeviceGet(self, device: Any, index: int) -> int:  # noqa: N802
        return 0 if index == 0 else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:  # noqa: N802
        name.value = b"Orin"
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:  # noqa: N802
        memory._obj.value = 8 << 30
        return 0

    def cuDeviceGetAttribute(self, value: Any, which: int, device: Any) -> int:  # noqa: N802
        value._obj.value = {75: 8, 76: 7}[which]
        return 0


def test_a_gpu_as_the_driver_describes_it() -> None:
    assert cuda.find_gpu(load=lambda name: Driver()) == Gpu("Orin", (8, 7), 8 << 30)
    assert cuda.find_gpu(1, load=lambda name: Driver()) is None, "there is only one"
    assert cuda.find_gpu(load=lambda name: Driver(status=100)) is None, "the driver does not start"


def test_no_driver_is_no_gpu() -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    assert cuda.find_gpu(load=missing) is None


@pytest.mark.parametrize(("number", "version"), [(101303, "10.13.3"), (100300, "10.3.0"), (110400, "11.4.0")])
def test_the_version_of_tensorrt(number: int, version: str) -> None:
    library = types.SimpleNamespace(getInferLibVersion=lambda: number)
    assert cuda.tensorrt_version(load=lambda name: library) == version


def test_missing_libraries_of_tensorrt_are_named_with_how_to_install_them(tmp_path: Path) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    assert cuda.tensorrt_version(load=missing) == ""
    (found,) = cuda.diagnose_tensorrt(load=missing)
    assert "libnvinfer.so.10, libnvonnxparser.so.10 not found" in found
    assert "pip install 'tensorrt-cu13>=10,<11'" in found
    # the provider's file of a build of ONNX Runtime for another TensorRT
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\0libnvinfer.so.11\0")
    ort: Any = types.SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    assert "pip install 'tensorrt-cu13>=11,<12'" in cuda.diagnose_tensorrt(ort, missing)[0]
    assert cuda.diagnose_tensorrt(load=lambda name: object()) == []


def test_libraries_from_pip_packages_are_preloaded_quietly_and_once(capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    class Runtime(types.ModuleType):
        def preload_dlls(self) -> None:
            calls.append(1)
            print("Failed to load libcudnn.so.9")

    ort = Runtime("onnxruntime")
    for _ in range(2):
        cuda.preload(ort)
    assert calls == [1]
    assert capsys.readouterr().out == ""


@needs_stub
def test_the_gpu_of_the_stub() -> None:
    imports = "import json; from dataclasses import asdict; from florence_onnx.runtime import cuda; "
    code = imports + "print(json.dumps(asdict(cuda.find_gpu())))"
    assert under_stub(code) == {"name": "stub", "compute_capability": [9, 0], "memory": 80 << 30}


# ------------------------------------------------------------------------------------------------------------- memory

MEMORY = """
import gc, json, numpy as np, onnxruntime
from florence_onnx.runtime.cuda_memory import CudaMemory
from florence_onnx.errors import DeviceMemoryError
from tests.cuda.cuda_stub import Counters
memory, counters = CudaMemory(onnxruntime.cuda_version), Counters()
"""


@needs_stub
def test_tensors_on_a_gpu() -> None:
    found = under_stub(
        MEMORY
        + """
whole = memory.allocate((4, 3), np.float32)
zeros = whole.download().tolist()
whole.upload(np.arange(12, dtype=np.float32))
wide = memory.allocate((2, 2, 5), np.float32)
source = memory.allocate((2, 2, 3), np.float32)
memory.copy(source, wide, num_axes=2)
source.upload(np.arange(12, dtype=np.float32))
memory.copy(source, wide, num_axes=2)
print(json.dumps([zeros, whole[1:3].download().tolist(), wide.download().tolist()]))
"""
    )
    assert found[0] == [[0.0] * 3] * 4
    assert found[1] == [[3, 4, 5], [6, 7, 8]]
    assert found[2] == [[[0, 1, 2, 0, 0], [3, 4, 5, 0, 0]], [[6, 7, 8, 0, 0], [9, 10, 11, 0, 0]]]


@needs_stub
def test_memory_of_dropped_tensors_is_reused_or_freed() -> None:
    """Not when a tensor is dropped, since a CUDA graph may be captured just then, but at the next allocation."""
    found = under_stub(
        MEMORY
        + """
first = memory.allocate((1000,), np.uint8)
address = first.address
del first; gc.collect()
freed = [counters["cudaFree"]]
same = memory.allocate((1000,), np.uint8).address == address
large = memory.allocate((100 << 20,), np.uint8)
del large; gc.collect()
freed.append(counters["cudaFree"])
memory.allocate((2000,), np.uint8)
freed.append(counters["cudaFree"])
print(json.dumps([same, freed]))
"""
    )
    assert found == [True, [0, 0, 2]], "the large block, and the small one with it"


@needs_stub
def test_on_a_full_gpu_dropped_tensors_are_freed_before_the_error() -> None:
    found = under_stub(
        MEMORY
        + """
kept = memory.allocate((600_000,), np.uint8)
dropped = memory.allocate((300_000,), np.uint8)
del dropped; gc.collect()
again = memory.allocate((350_000,), np.uint8)
try:
    memory.allocate((200_000,), np.uint8)
except DeviceMemoryError as error:
    print(json.dumps([str(error), counters["cudaGetLastError"] > 0]))
""",
        memory=1_000_000,
    )
    assert found[0].startswith("GPU 0 has no 200000 bytes left; a smaller max_batch")
    assert found[1], "otherwise ONNX Runtime would report it as its own next kernel's"


def test_a_missing_runtime_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from florence_onnx.runtime.cuda_memory import CudaMemory

    with pytest.raises(ProviderError, match=r"libcudart\.so\.99 not found.*pip install nvidia-cuda-runtime"):
        CudaMemory("99.0")


@needs_stub
def test_the_runtime_library_is_found_without_its_version() -> None:
    code = MEMORY + "print(json.dumps(CudaMemory('').allocate((2,), np.int64).download().tolist()))"
    assert under_stub(code) == [0, 0]


# ------------------------------------------------------------------------------------------------------- CUDA graphs


class Session:
    """A fake ONNX Runtime session, whose runs raise an error: those with a CUDA graph, or all."""

    def __init__(self, error: Exception | None, *, always: bool = False) -> None:
        self.error = error
        self.always = always
        self.ids: list[str] = []
        self.released: list[int] = []

    def io_binding(self) -> Any:
        return types.SimpleNamespace(bind_input=lambda *_: None, bind_output=lambda *_: None)

    def run_with_iobinding(self, binding: object, options: Any) -> None:
        graph_id = options.get_run_config_entry("gpu_graph_id") if options is not None else "none"
        self.ids.append(graph_id)
        if self.error is not None and (self.always or graph_id not in ("none", "-1")):
            raise self.error

    def release_captured_graph(self, graph_id: int) -> None:
        self.released.append(graph_id)


@pytest.fixture
def captured() -> OnnxEngine:
    """An engine that captures CUDA graphs, as on a GPU."""
    made = OnnxEngine(bundle.DEMO_DIRECTORY / bundle.TEXT_ENCODER, LoadOptions("cpu"))
    made.provider = "CUDAExecutionProvider"
    made.can_capture = made._needs_graph_id = True
    return made


def test_every_binding_has_a_graph_id_of_its_own(captured: OnnxEngine) -> None:
    session = Session(None)
    bindings = [OnnxBinding(captured, session) for _ in range(2)]
    bindings[0].run()
    for binding in bindings:
        binding.capture()
        binding.run()
    bindings[1].run()
    assert session.ids == ["-1", "1", "2", "2"]
    bindings[1].release()
    assert session.released == [2]


def test_without_a_capture_graphs_run_uncaptured(captured: OnnxEngine, caplog: pytest.LogCaptureFixture) -> None:
    session = Session(RuntimeError("operation not permitted when stream is capturing"))
    first, second = OnnxBinding(captured, session), OnnxBinding(captured, session)
    for binding in (first, second):
        binding.capture()
    for binding in (first, first, second):
        binding.run()
    assert session.ids == ["1", "-1", "-1", "-1"], "tried once, then no more by any binding"
    assert not captured.can_capture
    assert "operation not permitted" in captured.capture_error
    assert "runs without a CUDA graph, which is slower at every step" in caplog.text


def test_an_error_that_occurs_without_a_capture_too_is_raised(captured: OnnxEngine) -> None:
    binding = OnnxBinding(captured, Session(RuntimeError("CUDA failure 700: an illegal memory access"), always=True))
    binding.capture()
    with pytest.raises(ProviderError, match="CUDAExecutionProvider failed while running: CUDA failure 700"):
        binding.run()
    assert captured.can_capture, "the capture was not the reason"


def test_a_full_device_does_not_disable_capture(captured: OnnxEngine) -> None:
    session = Session(RuntimeError("Failed to allocate memory for requested buffer of size 5"))
    binding = OnnxBinding(captured, session)
    binding.capture()
    with pytest.raises(DeviceMemoryError, match="a smaller max_batch"):
        binding.run()
    assert captured.can_capture
    assert session.ids == ["1"]


@needs_stub
def test_a_graph_that_cannot_be_captured_is_loaded_without_cuda_graphs(tmp_path: Path) -> None:
    """Because of control flow, an `If` as in the decoder of the transformers.js layout."""
    onnx = pytest.importorskip("onnx", reason="builds a graph: pip install onnx")
    helper, floating = onnx.helper, onnx.TensorProto.FLOAT
    value = helper.make_tensor_value_info

    def branch(kind: str) -> Any:
        return helper.make_graph([helper.make_node(kind, ["x"], [kind])], kind, [], [value(kind, floating, ["n"])])

    node = helper.make_node("If", ["condition"], ["y"], then_branch=branch("Relu"), else_branch=branch("Exp"))
    inputs = [value("condition", onnx.TensorProto.BOOL, []), value("x", floating, ["n"])]
    graph = helper.make_graph([node], "choice", inputs, [value("y", floating, ["n"])])
    path = tmp_path / "graph.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    code = f"""
import json; from pathlib import Path
from florence_onnx.runtime.engine import OnnxEngine; from florence_onnx.runtime.load_options import LoadOptions
engine = OnnxEngine(Path({str(path)!r}), LoadOptions("cuda"), cuda_graphs=True)
print(json.dumps([engine.can_capture, engine.capture_error]))
"""
    can_capture, error = under_stub(code)
    assert can_capture is False
    assert "control flow" in error


# ---------------------------------------------------------------------------- a provider without kernels for this GPU


def test_a_provider_that_starts_and_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from florence_onnx import loading

    def fail(self: OnnxEngine, feeds: object) -> Any:
        raise ProviderError("CUDA failure 209: no kernel image is available for execution on the device")

    real = loading.load_engines

    def load(paths: Any, expected_inputs: Any, options: LoadOptions, *, cuda_graphs: bool) -> Any:
        return real(paths, expected_inputs, replace(options, device="cpu"))

    import onnxruntime

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(loading, "load_engines", load)
    monkeypatch.setattr(engine.OnnxEngine, "run", fail)
    with pytest.raises(
        ProviderError, match=r"starts but cannot run.*on a Jetson install NVIDIA's build instead of the one from PyPI"
    ):
        Florence2.from_pretrained("demo", device="cuda")


def test_a_graph_is_run_once_when_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check that fails in the test above passes where the kernels exist."""
    from florence_onnx import loading

    text = OnnxEngine(bundle.DEMO_DIRECTORY / bundle.TEXT_ENCODER, LoadOptions("cpu"))
    loading._check_kernels(bundle.read(bundle.DEMO_DIRECTORY), text)
    assert text.num_runs == 1
