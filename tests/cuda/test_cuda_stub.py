"""Calls of ONNX Runtime to CUDA in one session, and its errors when memory is full, under the stub.

These are the errors of onnxruntime-gpu 1.31.1 that `florence_onnx` translates to `DeviceMemoryError` (`F` stands for
the path of `bfc_arena.cc` and `BFCArena::AllocateRawInternal(…)`):

* a session that does not open, `gpu_mem_limit`: `onnxruntime.capi.onnxruntime_pybind11_state.Fail`,
  `[ONNXRuntimeError] : 1 : FAIL : Exception during initialization: F Available memory of 0 is smaller than requested
  bytes of N`;
* `run_with_iobinding`, `gpu_mem_limit`: the builtin `RuntimeError`, `Error in execution: Non-zero status code returned
  while running FusedMatMul node. Name:'…' Status Message: F Available memory of 0 is smaller than requested bytes of
  N`;
* `OrtValue.ortvalue_from_shape_and_type`, full GPU: the builtin `RuntimeError`, `F Failed to allocate memory for
  requested buffer of size N`;
* `run`, full GPU: `Fail`, `[ONNXRuntimeError] : 1 : FAIL : F Failed to allocate memory for requested buffer of size N`.
"""

from __future__ import annotations

from typing import Any

import pytest

from florence_onnx.bundles.memory import is_out_of_memory
from tests.cuda import cuda_stub

REASON = cuda_stub.unavailable()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "never")

FAIL = "onnxruntime.capi.onnxruntime_pybind11_state.Fail"
BARE = "builtins.RuntimeError"
OVER_THE_LIMIT = "is smaller than requested bytes of"
FULL = "Failed to allocate memory for requested buffer of size"
RUNS_TO_CAPTURE = 3
"""ONNX Runtime runs a graph twice, so that all memory is allocated, and captures the third run."""


def run(step: str, memory: int = 10**9) -> Any:
    """Runs a step of `tests.cuda.cuda_session` under the stub, on a GPU with `memory` bytes."""
    return cuda_stub.run("-m", "tests.cuda.cuda_session", step, memory=memory)


@pytest.fixture(scope="module")
def plain() -> dict[str, int]:
    found: dict[str, int] = run("plain")
    return found


@pytest.fixture(scope="module")
def captured() -> list[tuple[int, dict[str, int]]]:
    return [(graph_id, counts) for graph_id, counts in run("captured")]


def test_a_tensor_on_the_gpu_gives_back_what_was_uploaded() -> None:
    found = run("values")
    assert found["equal"]
    for counts, direction in zip(found["counts"], ("host to device", "device to host"), strict=True):
        assert {name: count for name, count in counts.items() if "bytes" in name} == {f"bytes {direction}": 4000}


def test_cuda_tells_kinds_of_memory_apart() -> None:
    found = run("values")
    assert found["kinds"] == {"OrtValue": 2, "numpy": 0, "registered": 1, "unregistered": 0}
    assert found["unregistering twice"] == [0, 1]


def test_device_memory_is_limited_zeroed_and_copied_by_rows() -> None:
    found = run("memory", memory=1000)
    assert found["in use"] == 600
    assert found["over the limit"] == 2, "cudaErrorMemoryAllocation"
    assert found["rows"] == [0, 1, 0, 0, 2, 3, 0, 0, 4, 5, 0, 0]
    assert found["frees"] == [0, 1], "cudaErrorInvalidValue for memory that was freed before"
    assert found["in use after"] == 0


def test_a_run_with_bound_buffers_copies_nothing_between_host_and_gpu(plain: dict[str, int]) -> None:
    assert plain["kernels"] > 50
    assert "bytes host to device" not in plain
    assert "bytes device to host" not in plain
    assert "cudaMalloc" not in plain


def test_a_host_input_is_copied_only_when_it_is_bound() -> None:
    """An array that changed must be bound again; an output is copied at every run."""
    ids, logits = 2 * 8, 2 * 1568 * 4
    assert run("host_buffers") == {
        "bind input": [ids, 0],
        "run": [0, 0],
        "run after a change": [0, 0],
        "bind output": [0, 0],
        "run to the host": [0, logits],
    }


def test_matrix_products_are_among_the_kernels(plain: dict[str, int]) -> None:
    """Everything that computes is counted as a kernel, and nothing else."""
    products = sum(count for name, count in plain.items() if name.startswith("cublasGemm"))
    assert products > 20
    assert plain["kernels"] == plain["__cudaLaunchKernel"] + products


def test_a_new_graph_id_is_captured_once(captured: list[tuple[int, dict[str, int]]], plain: dict[str, int]) -> None:
    for at in (0, 3):  # first runs of ids 1 and 2
        _, counts = captured[at]
        assert counts["cudaStreamBeginCapture"] == counts["cudaStreamEndCapture"] == counts["cudaGraphInstantiate"] == 1
        assert counts["cudaGraphLaunch"] == 1
        assert counts["kernels"] == RUNS_TO_CAPTURE * plain["kernels"]


def test_a_known_graph_id_is_launched_and_nothing_else(captured: list[tuple[int, dict[str, int]]]) -> None:
    """Also after runs with another id, and after runs without a CUDA graph."""
    for at in (1, 2, 4, 7):
        _, counts = captured[at]
        assert counts == {"cudaGraphLaunch": 1, "cudaStreamSynchronize": 1, "kernels": 0}


def test_graph_id_minus_one_is_an_ordinary_run(
    captured: list[tuple[int, dict[str, int]]], plain: dict[str, int]
) -> None:
    for at in (5, 6):
        graph_id, counts = captured[at]
        assert graph_id == -1
        assert counts["kernels"] == plain["kernels"]
        assert not {"cudaStreamBeginCapture", "cudaGraphLaunch"} & set(counts)


def test_onnx_runtime_makes_no_call_that_a_capture_forbids(
    captured: list[tuple[int, dict[str, int]]],
) -> None:
    assert all(cuda_stub.NOT_CAPTURABLE not in counts for _, counts in captured)
    assert run("forbidden") == 2, "the count works: cudaMalloc and cudaMemcpy, not cudaMemcpyAsync"


@pytest.mark.parametrize(
    ("step", "what", "memory", "kind", "said"),
    [
        ("limited", "open", 10**9, FAIL, OVER_THE_LIMIT),
        ("limited", "bound", 10**9, BARE, OVER_THE_LIMIT),
        ("full", "tensor", 8_000_000, BARE, FULL),
        ("full", "run", 8_000_000, FAIL, FULL),
    ],
)
def test_what_onnx_runtime_raises_where_memory_is_not_enough(
    step: str, what: str, memory: int, kind: str, said: str
) -> None:
    name, text = run(step, memory)[what]
    assert name == kind
    assert said in text
    assert is_out_of_memory(RuntimeError(text)), "this package recognises it"


def test_a_session_runs_again_once_memory_is_free() -> None:
    assert run("full", 8_000_000)["after"] == []
