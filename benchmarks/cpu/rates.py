"""What this machine can do: rates of matrix products and of reading memory. The denominator of the floor.

`python -m benchmarks.cpu.rates JSON` measures them in a process of its own, as `compare` does in every round.
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
"""How long a rate is measured at least."""
_READ_BYTES = 512 * 2**20
"""Far more than any cache holds."""
_PROBE = (577, 768, 768)
"""A product small enough that even an emulated type takes a fraction of a second."""
_LARGE = (2304, 1024, 4096)


def best_seconds(function: Callable[[], object], at_least: float = _SECONDS) -> float:
    """The shortest of as many calls as fit into `at_least` seconds, three or more, after one to warm up."""
    function()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < at_least:
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken)


def onnx_rate(kind: str, shape: Sequence[int], threads: int, seconds: float = _SECONDS) -> float:
    """Operations a second of one product in ONNX Runtime.

    Args:
        kind: `fp32` (MatMul) or `int8` (DynamicQuantizeMatMul, per column).
        shape: Rows, inner, columns; the right matrix is constant, as weights are.
        threads: Of the session.
        seconds: To measure at least.
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
    """Operations a second of a product in PyTorch; of a small one where the type turns out to be emulated.

    Args:
        dtype: `float32` or `bfloat16`.
        threads: Of PyTorch.
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
    """Bytes a second that `threads` threads read together, each its own part: the best of two ways to read."""
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
    """All rates.

    Args:
        shapes: Products of the model, `[rows, inner, columns]`.
        threads: To use.
        read_bytes: To read from memory at a time.
        seconds: To measure each product at least.

    Returns:
        `fp32`, `int8` and `bf16` in operations a second, the best over the shapes (`bf16` None without PyTorch), `by_shape`, and
        `read` in bytes a second.
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
    """Measures what the JSON of the command line asks for: the arguments of `measure`."""
    sys.stdout.write(json.dumps(measure(**json.loads(sys.argv[1]))) + "\n")


if __name__ == "__main__":
    main()
