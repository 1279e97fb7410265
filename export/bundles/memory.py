"""How much memory a graph needs on a device, found in the graph itself: what it holds, and what is alive at its fullest moment.

ONNX Runtime fuses some nodes, which needs less, and keeps what it once took, in pieces of its own sizes, which needs more; so these
are estimates of what its arenas grow to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from florence_onnx.bundles.bundle import DECODER_TOP, TEXT_ENCODER, VISION_ENCODER, Bundle
from florence_onnx.bundles.memory import IMAGE
from florence_onnx.runtime.tensorrt import profiles

VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
"""Operators whose output is their input's memory."""
TOKENS = 4
"""Of a step, in the measurement of what each needs."""
IMAGES = 4


def measure(bundle: Bundle) -> dict[str, Any]:
    """The facts from which `florence_onnx.bundles.memory` computes what a model needs.

    Args:
        bundle: With all graphs written; its description need not be.

    Returns:
        `weights`, bytes by graph; `IMAGE`, bytes of activations for each image of the vision encoder; `text_encoder`, pairs of a
        prompt's tokens and the bytes of activations; `token`, bytes of activations of the decoder for each token of a step.
    """
    paths = bundle.stages(is_resident=True)
    shapes = profiles(bundle, max_batch=1)
    vision, text, decoder = (shapes[name] for name in (VISION_ENCODER, TEXT_ENCODER, DECODER_TOP))
    images = {"pixel_values": (IMAGES, *vision["min"]["pixel_values"][1:])}
    step = {
        name: (shape[0], TOKENS, *shape[2:]) if name in _PER_TOKEN else shape for name, shape in decoder["opt"].items()
    }
    found = {
        name: _measure(path, sizes)
        for name, path, sizes in (
            (VISION_ENCODER, paths[VISION_ENCODER], [images]),
            (TEXT_ENCODER, paths[TEXT_ENCODER], [text["min"], text["max"]]),
            (DECODER_TOP, paths[DECODER_TOP], [step]),
        )
    }
    prompts = [shape["input_ids"][1] for shape in (text["min"], text["max"])]
    return {
        "weights": {name: weights for name, (weights, _) in found.items()},
        IMAGE: found[VISION_ENCODER][1][0] // IMAGES,
        "text_encoder": [list(pair) for pair in zip(prompts, found[TEXT_ENCODER][1], strict=True)],
        "token": found[DECODER_TOP][1][0] // TOKENS,
    }


def _measure(path: Path, sizes: Sequence[Mapping[str, tuple[int, ...]]]) -> tuple[int, list[int]]:
    """Bytes of a graph's weights, and of its activations at some sizes of its inputs."""
    graph = onnx.load(str(path))  # one at a time: with its weights, at which the inference below looks
    return weight_bytes(graph), [activation_bytes(graph, shapes) for shapes in sizes]


_PER_TOKEN = ("input_ids", "positions", "slots", "visible")


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the weights of a graph, and of their transposes, which ONNX Runtime makes when it loads."""
    sizes = {tensor.name: _tensor_bytes(tensor.data_type, tensor.dims) for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    turned = [node.input[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in sizes]
    return sum(sizes.values()) + sum(sizes[name] for name in turned if readers[name] > 1)


def activation_bytes(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the values between a graph's inputs and outputs at the moment when they are most.

    Args:
        model: The graph.
        inputs: Shapes of its inputs.

    Raises:
        ValueError: The shape of a large value cannot be told.
    """
    sizes = _sizes(model, inputs)
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    kept |= _constants(model)
    owners: dict[str, str] = {}
    last: dict[str, int] = {}
    for at, node in enumerate(model.graph.node):
        for name in node.input:
            last[owners.get(name, name)] = at
        if node.op_type in VIEWS:
            owners[node.output[0]] = owners.get(node.input[0], node.input[0])
    alive = peak = 0
    for at, node in enumerate(model.graph.node):
        new = [name for name in node.output if name and name not in owners and name not in kept]
        alive += sum(sizes.get(name, 0) for name in new)
        peak = max(peak, alive)
        ended = {owners.get(name, name) for name in node.input} | set(new)
        alive -= sum(sizes.get(name, 0) for name in ended if last.get(name, at) == at and name not in kept)
    return peak


def _constants(model: onnx.ModelProto) -> set[str]:
    """Weights, and what follows from them alone, which is computed when the graph is loaded."""
    found = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(name in found for name in node.input if name)):
            found.update(node.output)
    return found


def _sizes(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Bytes of every value whose shape follows from those of the inputs."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        kind = value.type.tensor_type.elem_type
        value.type.CopyFrom(helper.make_tensor_type_proto(kind, inputs[value.name]))
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    # onnx's own inference loses the thread where a shape is computed, as for a padding
    inferred = SymbolicShapeInference.infer_shapes(fixed, auto_merge=True)
    found = {}
    for value in inferred.graph.value_info:
        dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in value.type.tensor_type.shape.dim]
        if None not in dims:
            found[value.name] = _tensor_bytes(value.type.tensor_type.elem_type, [dim or 0 for dim in dims])
    return found


def _tensor_bytes(kind: int, shape: Any) -> int:
    itemsize: int = helper.tensor_dtype_to_np_dtype(kind).itemsize if kind != TensorProto.UNDEFINED else 0
    return math.prod(shape) * itemsize
