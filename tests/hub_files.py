"""Files of other precisions as repositories in the layout of transformers.js publish them, made from an fp32 export.

By the tools that they were made with: ONNX Runtime's dynamic quantizer, its packing of 4-bit blocks, and its fp16 converter
over the whole merged decoder, which leaves the defect that `florence_onnx.runtime.graph_repair` repairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxruntime.capi._pybind_state import quantize_matmul_4bits
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from florence_onnx.bundles.precisions import JS_GRAPHS, js_file

BLOCK = 32
"""Weights that share a scale."""
CONTRIB = "com.microsoft"
PRECISIONS = ("fp16", "q8", "uint8", "q4", "q4f16")
_INTEGERS = {"q8": QuantType.QInt8, "uint8": QuantType.QUInt8}


def publish(directory: Path, *wanted: str) -> None:
    """Adds files of further precisions to a directory that has fp32 files.

    Args:
        directory: The root of the layout.
        wanted: Of `PRECISIONS`.
    """
    for precision in wanted:
        for module in JS_GRAPHS:
            _convert(directory / js_file(module, "fp32"), directory / js_file(module, precision), precision)


def _convert(source: Path, target: Path, precision: str) -> None:
    if precision in _INTEGERS:
        options = {"EnableSubgraph": True, "MatMulConstBOnly": True}
        quantize_dynamic(source, target, weight_type=_INTEGERS[precision], extra_options=options)
        return
    model = onnx.load(str(source))
    if precision.startswith("q4"):
        _to_q4(model)
    if precision.endswith("f16") or precision == "fp16":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the converter tells of values that it cuts off
            model = convert_float_to_float16(model, keep_io_types=True)
    onnx.save(model, str(target))


def _to_q4(model: onnx.ModelProto) -> None:
    """Replaces products with constant weights by `MatMulNBits`, in branches too, where the weights are those of the outer graph."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    packed: set[str] = set()
    for graph in all_graphs(model.graph):
        for node in graph.node:
            if node.op_type != "MatMul" or node.input[1] not in weights:
                continue
            name = node.input[1]
            weight = numpy_helper.to_array(weights[name])
            if weight.ndim != 2 or weight.dtype != np.float32 or weight.shape[0] % BLOCK:
                continue
            if name not in packed:
                packed.add(name)
                model.graph.initializer.extend(_pack(name, weight))
            node.CopyFrom(_blocks_node(node, weight))
    model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    read = {name for graph in all_graphs(model.graph) for node in graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _pack(name: str, weight: np.ndarray) -> Iterator[onnx.TensorProto]:
    rows, columns = weight.shape
    blocks = rows // BLOCK
    values = np.zeros((columns, blocks, BLOCK // 2), dtype=np.uint8)
    scales = np.zeros(columns * blocks, dtype=np.float32)
    quantize_matmul_4bits(
        values,
        np.ascontiguousarray(weight),
        scales,
        np.zeros(columns * ((blocks + 1) // 2), np.uint8),
        BLOCK,
        columns,
        rows,
        True,
    )
    yield numpy_helper.from_array(values, f"{name}_q4")
    yield numpy_helper.from_array(scales, f"{name}_scales")


def _blocks_node(node: onnx.NodeProto, weight: np.ndarray) -> onnx.NodeProto:
    name = node.input[1]
    sizes = {"K": weight.shape[0], "N": weight.shape[1], "bits": 4, "block_size": BLOCK}
    inputs = [node.input[0], f"{name}_q4", f"{name}_scales"]
    return helper.make_node("MatMulNBits", inputs, list(node.output), name=node.name, domain=CONTRIB, **sizes)


def all_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and the branches in it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from all_graphs(attribute.g)
