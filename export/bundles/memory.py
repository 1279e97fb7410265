"""How much memory a graph needs on a device, computed from the graph: its weights, and the peak of its activations.

These are estimates of what ONNX Runtime's arenas grow to. It fuses some nodes, which needs less, and allocates in
chunks that it does not return, which needs more.
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
"""Operators whose output shares the memory of their input."""
TOKENS = 4
"""Tokens of the decoder call in which the memory for each token is measured."""
IMAGES = 4
"""Images of the batch in which the memory for each image is measured."""


def measure(bundle: Bundle) -> dict[str, Any]:
    """Measures the figures from which `florence_onnx.bundles.memory` forecasts the memory of a model.

    Args:
        bundle: All its graphs must be written; its description need not be.

    Returns:
        All in bytes: `weights`, by graph; `IMAGE`, activations of the vision encoder per image; `text_encoder`, pairs
        of a number of prompt tokens and the activations for them; `token`, activations of the decoder per token of a
        step.
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
    """Returns the bytes of a graph's weights, and those of its activations for several input shapes."""
    graph = onnx.load(str(path))  # with its weights, which shape inference reads
    return weight_bytes(graph), [activation_bytes(graph, shapes) for shapes in sizes]


_PER_TOKEN = ("input_ids", "positions", "slots", "visible")


def weight_bytes(model: onnx.ModelProto) -> int:
    """Returns the bytes of a graph's weights, and of their transposes, which ONNX Runtime computes at load."""
    sizes = {tensor.name: _tensor_bytes(tensor.data_type, tensor.dims) for tensor in model.graph.initializer}
    readers: dict[str, int] = {}
    for node in model.graph.node:
        for name in node.input:
            readers[name] = readers.get(name, 0) + 1
    turned = [node.input[0] for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in sizes]
    return sum(sizes.values()) + sum(sizes[name] for name in turned if readers[name] > 1)


def activation_bytes(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> int:
    """Returns the peak size in bytes of the values between a graph's inputs and outputs.

    Nodes run in their order in the file; a value is freed after its last reader.

    Args:
        model: The graph.
        inputs: Shapes of its inputs. Values whose shapes do not follow from them count as empty.
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
    """Returns the names of the weights, and of values that depend on them alone, which are folded at load."""
    found = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" or (node.input and all(name in found for name in node.input if name)):
            found.update(node.output)
    return found


def _sizes(model: onnx.ModelProto, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Returns the bytes of every value whose shape follows from the shapes of the inputs."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    for value in fixed.graph.input:
        kind = value.type.tensor_type.elem_type
        value.type.CopyFrom(helper.make_tensor_type_proto(kind, inputs[value.name]))
    for value in fixed.graph.output:
        value.type.tensor_type.ClearField("shape")
    del fixed.graph.value_info[:]
    # onnx's own shape inference gives up where a shape is computed, such as that of a Pad.
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
