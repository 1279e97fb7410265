"""Rates of this machine: matrix products and reading memory. The floor is a model's costs divided by them.

`python -m benchmarks.cpu.rates JSON` measures them in a process of its own; `compare` does so in every round.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

_SECONDS = 0.1
"""Seconds for which a rate is measured at least."""
_READ_BYTES = 512 * 2**20
"""Much more than the CPU's caches hold."""
_PROBE = (577, 768, 768)
"""Shape of a product that takes a fraction of a second even in a dtype that the CPU emulates."""
_LARGE = (2304, 1024, 4096)


def best_seconds(function: Callable[[], object], at_least: float = _SECONDS) -> float:
    """Returns the shortest time of at least three calls, and at least `at_least` seconds, after a warm-up."""
    function()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < at_least:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)


def onnx_rate(kind: str, shape: Sequence[int], threads: int, seconds: float = _SECONDS) -> float:
    """Measures the operations per second of one product in ONNX Runtime.

    Args:
        kind: `fp32` (MatMul) or `int8` (DynamicQuantizeMatMul, a scale per column).
        shape: Rows, inner, columns. The right matrix is constant, as weights are.
        threads: Threads of the session.
        seconds: Seconds to measure at least.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    model = (_matmul if kind == "fp32" else _quantized_matmul)(*shape)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"a": np.random.default_rng(0).standard_normal(shape[:2], dtype=np.float32)}
    return float(2 * np.prod(shape, dtype=np.float64) / best_seconds(lambda: session.run(None, feeds), seconds))


def _matmul(rows: int, inner: int, columns: int) -> Any:
    weights = np.random.default_rng(1).standard_normal((inner, columns), dtype=np.float32)
    return _graph("MatMul", "", ["a", "b"], {"b": weights}, rows, inner, columns)


def _quantized_matmul(rows: int, inner: int, columns: int) -> Any:
    constants = {
        "b": np.random.default_rng(1).integers(-127, 128, (inner, columns)).astype(np.int8),
        "scale": np.full(columns, 0.01, dtype=np.float32),
        "zero": np.zeros(columns, dtype=np.int8),
    }
    return _graph("DynamicQuantizeMatMul", "com.microsoft", ["a", *constants], constants, rows, inner, columns)


def _graph(
    operator: str, domain: str, inputs: list[str], constants: dict[str, Any], rows: int, inner: int, columns: int
) -> Any:
    from onnx import TensorProto, helper, numpy_helper

    node = helper.make_node(operator, inputs, ["c"], domain=domain)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [rows, inner])],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [rows, columns])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def torch_rate(dtype: str, threads: int) -> float:
    """Measures the operations per second of a product in PyTorch; only of a small one if the CPU emulates the dtype.

    Args:
        dtype: `float32` or `bfloat16`.
        threads: Threads of PyTorch.
    """
    import torch

    torch.set_num_threads(threads)

    def rate(rows: int, inner: int, columns: int) -> float:
        a, b = torch.randn(rows, inner).to(getattr(torch, dtype)), torch.randn(columns, inner).to(getattr(torch, dtype))
        with torch.inference_mode():
            seconds = best_seconds(lambda: torch.nn.functional.linear(a, b))
        return 2 * rows * inner * columns / seconds

    small = rate(*_PROBE)
    return small if small < 10e9 else max(small, rate(*_LARGE))


def read_rate(threads: int, size: int = _READ_BYTES) -> float:
    """Measures the bytes per second that `threads` threads read together, by the faster of two methods."""
    data = np.ones(size // 4, dtype=np.float32)
    parts = np.array_split(data, threads)

    def together(function: Callable[[Any], object]) -> Callable[[], object]:
        return lambda: list(pool.map(function, parts))

    with ThreadPoolExecutor(threads) as pool:
        seconds = [best_seconds(together(way)) for way in (lambda part: part @ part, np.max)]
    return data.nbytes / min(seconds)


def measure(
    shapes: Sequence[Sequence[int]], threads: int, read_bytes: int = _READ_BYTES, seconds: float = _SECONDS
) -> dict[str, Any]:
    """Measures all rates.

    Args:
        shapes: Products of the model, `[rows, inner, columns]`.
        threads: Threads to use.
        read_bytes: Bytes to read from memory in each pass.
        seconds: Seconds to measure each product at least.

    Returns:
        `fp32`, `int8` and `bf16` in operations per second, the best over the shapes (`bf16` is None without PyTorch),
        `by_shape`, and `read` in bytes per second.
    """
    by_shape: list[dict[str, Any]] = [
        {"shape": list(shape), **{kind: onnx_rate(kind, shape, threads, seconds) for kind in ("fp32", "int8")}}
        for shape in shapes
    ]
    best: dict[str, Any] = {kind: max(row[kind] for row in by_shape) for kind in ("fp32", "int8")}
    try:
        best["bf16"] = torch_rate("bfloat16", threads)
    except ImportError:
        best["bf16"] = None
    return {**best, "read": read_rate(threads, read_bytes), "by_shape": by_shape}


def main() -> None:
    """Command line: calls `measure` with the arguments in the given JSON, and prints the result as JSON."""
    sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
