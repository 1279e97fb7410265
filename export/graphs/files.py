"""Reading, tidying and writing `.onnx` files: every weight stored once, and nothing about the exporting machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

_MIN_SHARED_BYTES = 1024
"""Smaller tensors are not shared: they are scalars and shapes, and sharing them saves nothing."""

_MAX_PROTOBUF_BYTES = 2**31 - 2**24
"""protobuf's limit of 2 GiB, minus room for the nodes."""


def tidy(path: Path) -> None:
    """Shares equal weights and removes doc strings and metadata, in place."""
    model = onnx.load(str(path))
    share_weights(model)
    strip(model)
    save(model, path)


def save(model: onnx.ModelProto, path: Path) -> None:
    """Writes a model; weights beyond protobuf's limit go to `<path>_data` beside it."""
    data = path.with_name(path.name + "_data")
    data.unlink(missing_ok=True)
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) < _MAX_PROTOBUF_BYTES:
        onnx.save(model, str(path))
    else:
        onnx.save(model, str(path), save_as_external_data=True, location=data.name)


def strip(model: onnx.ModelProto) -> None:
    """Removes doc strings and metadata, in which torch writes source paths and stack traces of this machine."""
    model.ClearField("doc_string")
    del model.metadata_props[:]
    for graph in graphs(model.graph):
        graph.ClearField("doc_string")
        for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            item.ClearField("doc_string")
            del item.metadata_props[:]


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yields a graph and all subgraphs inside its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


def share_weights(model: onnx.ModelProto) -> None:
    """Replaces equal initializers by one, and an initializer that is the transpose of another by a `Transpose` node.

    Of an embedding and its transpose, the one that a `Gather` reads is kept: a `Gather` of a `Transpose` could not be
    quantized. ONNX Runtime folds the `Transpose` when it loads the graph, so it costs nothing per run.
    """
    names: dict[str, str] = {}
    transposed: dict[str, str] = {}
    kept: dict[tuple[Any, ...], str] = {}
    gathered = {node.input[0] for graph in graphs(model.graph) for node in graph.node if node.op_type == "Gather"}
    for tensor in sorted(model.graph.initializer, key=lambda tensor: tensor.name not in gathered):
        array = numpy_helper.to_array(tensor)
        if array.nbytes < _MIN_SHARED_BYTES:
            continue
        if (same := kept.get(_fingerprint(array))) is not None:
            names[tensor.name] = same
        elif array.ndim == 2 and (other := kept.get(_fingerprint(array.T))) is not None:
            transposed[tensor.name] = other
        else:
            kept[_fingerprint(array)] = tensor.name
    _rename_inputs(model, names)
    _insert_transposes(model, transposed)
    remaining = [item for item in model.graph.initializer if item.name not in names and item.name not in transposed]
    del model.graph.initializer[:]
    model.graph.initializer.extend(remaining)


def _fingerprint(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes()).digest()
    return str(array.dtype), array.shape, digest


def _rename_inputs(model: onnx.ModelProto, names: dict[str, str]) -> None:
    for graph in graphs(model.graph):
        for node in graph.node:
            for index, name in enumerate(node.input):
                node.input[index] = names.get(name, name)


def _insert_transposes(model: onnx.ModelProto, sources: dict[str, str]) -> None:
    """Inserts `Transpose` nodes whose outputs take the names of the removed initializers, which nodes read."""
    for target, source in sources.items():
        node = onnx.helper.make_node("Transpose", [source], [target], name=f"transpose_{target}", perm=[1, 0])
        model.graph.node.insert(0, node)
