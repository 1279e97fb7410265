"""Too little memory while a model is loaded: limits of the system, and what they made the interpreter raise."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from florence_onnx import DeviceMemoryError, Florence2
from florence_onnx.bundles import bundle
from florence_onnx.runtime import memory_errors, sessions
from florence_onnx.runtime.engine import OnnxEngine

MIB = 2**20
WEIGHTS = 64 * MIB
"""Bytes of weights of the graph that must not fit."""

LIMITED = """
import resource, sys
from pathlib import Path
from florence_onnx import DeviceMemoryError, Florence2
from florence_onnx.runtime.engine import OnnxEngine
from florence_onnx.runtime.sessions import onnxruntime
onnxruntime()
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    {call}
except DeviceMemoryError as error:
    print(error)
else:
    print("loaded")
"""
"""Loads what it is given with so many bytes of data more than it has when everything is imported."""


def load_limited(call: str, path: Path | str, num_bytes: int) -> str:
    """What a process says that loads a graph or a model with so many bytes more."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the limit of a process's data is Linux's: run this on Linux")
    command = [sys.executable, "-c", LIMITED.format(call=call), str(path), str(num_bytes)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def heavy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph of one product, with its weights beside it."""
    onnx = pytest.importorskip("onnx", reason="makes a graph: pip install -e '.[export]'")
    import numpy as np

    folder: Path = tmp_path_factory.mktemp("heavy")
    rows = WEIGHTS // 4 // 1024
    weights = onnx.numpy_helper.from_array(np.ones((rows, 1024), dtype=np.float32), "w")
    make, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = make.make_graph(
        [make.make_node("MatMul", ["x", "w"], ["y"])],
        "heavy",
        [make.make_tensor_value_info("x", float32, ["n", rows])],
        [make.make_tensor_value_info("y", float32, ["n", 1024])],
        [weights],
    )
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "heavy.onnx", save_as_external_data=True, location="heavy.onnx_data")
    return folder / "heavy.onnx"


LOAD_GRAPH = "OnnxEngine(Path(sys.argv[1]))"


def test_a_graph_that_does_not_fit_is_not_called_corrupt(heavy: Path) -> None:
    said = load_limited(LOAD_GRAPH, heavy, WEIGHTS)
    assert said.startswith(f"out of memory: CPUExecutionProvider cannot load {heavy}. Its files have 64 MiB")
    need = (2 * WEIGHTS + memory_errors.OVERHEAD) // MIB
    assert f"takes about {need} MiB of free memory" in said and "bad_alloc" in said


def test_what_the_error_says_is_enough(heavy: Path) -> None:
    assert load_limited(LOAD_GRAPH, heavy, 2 * WEIGHTS + memory_errors.OVERHEAD) == "loaded\n"


def test_a_model_that_does_not_fit_is_an_error_of_ours() -> None:
    said = load_limited('Florence2.from_pretrained(sys.argv[1], device="cpu")', "demo", MIB)
    assert said.startswith("out of memory")


ERRORS = [
    (MemoryError(), "out of memory: "),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory: "),
    (RuntimeError("pthread_create failed, error code: 12 error msg: Cannot allocate memory"), "out of memory: "),
    (RuntimeError("can't start new thread"), "out of memory, or of the threads that a process may have: "),
]
"""What loads under limits have ended in, and how our error begins."""


@pytest.mark.parametrize(("raised", "begins"), ERRORS, ids=[repr(error) for error, _ in ERRORS])
def test_errors_of_the_interpreter_become_ours(raised: Exception, begins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise raised

    monkeypatch.setattr("florence_onnx.model.load", fail)
    with pytest.raises(DeviceMemoryError) as caught:
        Florence2.from_pretrained("demo", device="cpu")
    assert str(caught.value).startswith(f"{begins}cannot load {bundle.DEMO_DIRECTORY}. Its files have 7 MiB")
    monkeypatch.setattr("florence_onnx.model.hub.resolve", fail)
    with pytest.raises(DeviceMemoryError, match="cannot load demo"):
        Florence2.from_pretrained("demo", device="cpu")


@pytest.mark.parametrize("raised", [RuntimeError("another reason"), OSError(errno.EIO, "Input/output error")])
def test_other_errors_are_left_alone(raised: Exception) -> None:
    with pytest.raises(type(raised)) as caught, memory_errors.said_as_such("a model"):
        raise raised
    assert caught.value is raised


def test_a_memory_error_of_onnxruntime_is_ours_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(sessions.onnxruntime(), "InferenceSession", fail)
    with pytest.raises(DeviceMemoryError, match=r"out of memory: CPUExecutionProvider cannot load .*decoder\.onnx"):
        OnnxEngine(bundle.DEMO_DIRECTORY / bundle.DECODER)


@pytest.fixture
def no_saving(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Sessions that have no memory to save the optimised graph; whether each was to save it."""
    ort = sessions.onnxruntime()
    start, saving = ort.InferenceSession, []

    def open_session(path: str, options: Any, **rest: Any) -> Any:
        saving.append(bool(options.optimized_model_filepath))
        if saving[-1]:
            raise MemoryError
        return start(path, options, **rest)

    monkeypatch.setattr(ort, "InferenceSession", open_session)
    yield saving


def test_without_memory_for_the_graph_cache_the_graph_is_loaded_without(no_saving: list[bool], tmp_path: Path) -> None:
    from florence_onnx.runtime.load_options import LoadOptions

    engine = OnnxEngine(bundle.DEMO_DIRECTORY / bundle.DECODER, LoadOptions("cpu", graph_cache=tmp_path))
    assert engine.provider == sessions.CPU and no_saving == [True, False]
