"""Quantization: matrix products with constant weights become ONNX Runtime's quantized operators.

There are two forms, for what limits a graph on a CPU:

* The encoders multiply hundreds of tokens by every weight and are limited by arithmetic. `DynamicQuantizeMatMul`
  multiplies 8-bit integers. It quantizes activations with one scale for the whole tensor, found in every call. All rows
  of a batch share that scale, so a row's result depends slightly on the other rows of its batch, and a batch need not
  give the very tokens of single calls.
* The decoder reads every weight for a few tokens and is limited by memory bandwidth. `MatMulNBits` stores 8 or 4 bits
  per weight in blocks of 32 with one scale each. It quantizes activations row by row, so no row depends on its
  neighbours in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from ..graphs.files import save

Floats = npt.NDArray[np.float32]

BLOCK_SIZE = 32
"""Weights that share a scale. `MatMulNBits` offers 16, 32 and more."""
INT8_ACCURACY = 4
"""`accuracy_level` of `MatMulNBits` that quantizes activations to 8 bits; otherwise weights are expanded to fp32."""
MAX_DYNAMIC_WEIGHT = 63
"""Largest quantized weight: 7 bits. CPUs without VNNI add two products in 16 bits, which 8-bit weights overflow."""
MIN_WIDTH = 16
"""Products with fewer input or output channels stay in fp32: they take no time."""

CONTRIB = "com.microsoft"


@dataclass(frozen=True)
class _Product:
    """A `MatMul` or `Gemm` node whose second factor is constant."""

    node: onnx.NodeProto
    weight: Floats
    """`(K, N)`: input channels by output channels."""
    source: str
    """Name of the initializer that holds the weight or its transpose."""
    bias: str
    """Name of the constant `(N,)` that is added, or empty."""


def to_dynamic_int8(path: Path, *, kinds: tuple[str, ...] = ("MatMul", "Gemm")) -> None:
    """Replaces products of activations and weights by `DynamicQuantizeMatMul`, in place.

    Weights have a scale per output channel, activations one for the whole tensor.

    Args:
        path: The `.onnx` file.
        kinds: The operators to replace. In the vision encoder the linear layers are `Gemm` nodes. Its `MatMul` nodes
            with constants multiply sums over all tokens (`vision_encoder.ChannelAttention`), whose range is too large
            for 8 bits.
    """
    model = onnx.load(str(path))
    for product in list(_products(model)):
        if product.node.op_type in kinds:
            _replace(model, product, _dynamic_node(model, product))
    _finish(model, path)


def to_blocks(path: Path, *, bits: int) -> None:
    """Replaces every product of activations and weights by `MatMulNBits`, in place.

    The language model head always has 8 bits: it tells apart location tokens whose rows differ little from their
    neighbours'. The token embedding, which is the same matrix, is read from the same bytes.

    Args:
        path: The `.onnx` file.
        bits: 8 or 4, for all other weights.
    """
    model = onnx.load(str(path))
    embeddings = {node.input[0]: node for node in model.graph.node if node.op_type == "Gather"}
    for product in list(_products(model)):
        is_head = product.source in embeddings
        if product.weight.shape[0] % BLOCK_SIZE:
            continue
        blocks = _Blocks.of(product.weight.T, 8 if is_head else bits)
        _replace(model, product, _block_node(model, product, blocks))
        if is_head:
            _read_embedding(model, embeddings[product.source], product.node.output[0], blocks)
    _finish(model, path)


# ------------------------------------------------------------------------------------------------------------- finding


def _products(model: onnx.ModelProto) -> Iterator[_Product]:
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    flipped = {
        node.output[0]: node.input[0]
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in constants
    }
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        source = flipped.get(node.input[1], node.input[1])
        if source not in constants or len(constants[source].dims) != 2:
            continue
        weight = numpy_helper.to_array(constants[source])
        is_transposed = (source != node.input[1]) != bool(_attribute(node, "transB"))
        weight = weight.T if is_transposed else weight
        if min(weight.shape) >= MIN_WIDTH and weight.dtype == np.float32:
            yield _Product(node, weight, source, node.input[2] if len(node.input) > 2 else "")


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


# ------------------------------------------------------------------------------------------------------------- weights


def _dynamic_node(model: onnx.ModelProto, product: _Product) -> onnx.NodeProto:
    weight, name = product.weight, product.node.output[0]
    scale = np.maximum(np.abs(weight).max(axis=0), np.finfo(np.float32).tiny) / np.float32(MAX_DYNAMIC_WEIGHT)
    values = np.rint(weight / scale).astype(np.int8)
    inputs = [
        product.node.input[0],
        _add(model, f"{name}_int8", values),
        _add(model, f"{name}_scale", scale.astype(np.float32)),
        _add(model, f"{name}_zero", np.zeros(len(scale), dtype=np.int8)),
        product.bias,
    ]
    return helper.make_node("DynamicQuantizeMatMul", inputs, [name], name=f"{name}_dynamic", domain=CONTRIB)


@dataclass(frozen=True)
class _Blocks:
    """A weight, quantized in blocks along its input channels."""

    bits: int
    values: npt.NDArray[np.uint8]
    """`(N, K / BLOCK_SIZE, BLOCK_SIZE * bits / 8)`. Two 4-bit weights share a byte, the first in its lower half."""
    scales: Floats
    """`(N, K / BLOCK_SIZE)`."""

    @classmethod
    def of(cls, weight: Floats, bits: int) -> _Blocks:
        """Quantizes a weight `(N, K)`. The zero point is the middle of the range, the default of `MatMulNBits`."""
        middle = 1 << (bits - 1)
        blocks = weight.reshape(len(weight), -1, BLOCK_SIZE)
        # The range is -middle to middle - 1. The value of largest magnitude is mapped to -middle whatever its sign (the
        # scale may be negative), so that the whole range is used.
        extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
        scales = np.where(extreme == 0, np.float32(1), extreme / np.float32(-middle)).astype(np.float32)
        values = np.clip(np.rint(blocks / scales) + middle, 0, 2 * middle - 1).astype(np.uint8)
        if bits == 4:
            values = values[..., 0::2] | (values[..., 1::2] << 4)
        return cls(bits, values, scales[..., 0])


def _block_node(model: onnx.ModelProto, product: _Product, blocks: _Blocks) -> onnx.NodeProto:
    name = product.node.output[0]
    width, channels = product.weight.shape
    inputs = [
        product.node.input[0],
        _add(model, f"{name}_blocks", blocks.values),
        _add(model, f"{name}_scales", blocks.scales.reshape(-1)),
        "",
        "",
        product.bias,
    ]
    while not inputs[-1]:
        inputs.pop()
    return helper.make_node(
        "MatMulNBits",
        inputs,
        [name],
        name=f"{name}_blocks",
        domain=CONTRIB,
        K=width,
        N=channels,
        bits=blocks.bits,
        block_size=BLOCK_SIZE,
        accuracy_level=INT8_ACCURACY,
    )


def _read_embedding(model: onnx.ModelProto, gather: onnx.NodeProto, name: str, blocks: _Blocks) -> None:
    """Replaces the embedding's `Gather` by one from the head's bytes, stored once (`bundles/weights.py`)."""
    inputs = [
        _add(model, f"{name}_rows", blocks.values.reshape(len(blocks.values), -1)),
        gather.input[1],
        _add(model, f"{name}_row_scales", blocks.scales),
    ]
    node = helper.make_node(
        "GatherBlockQuantized",
        inputs,
        list(gather.output),
        name=f"{gather.name}_blocks",
        domain=CONTRIB,
        gather_axis=0,
        quantize_axis=1,
        block_size=BLOCK_SIZE,
        bits=blocks.bits,
    )
    _swap(model, gather, node)


# ------------------------------------------------------------------------------------------------------------- editing


def _add(model: onnx.ModelProto, name: str, values: npt.NDArray[np.generic]) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    return name


def _replace(model: onnx.ModelProto, product: _Product, node: onnx.NodeProto) -> None:
    _swap(model, product.node, node)


def _swap(model: onnx.ModelProto, old: onnx.NodeProto, new: onnx.NodeProto) -> None:
    place = next(index for index, node in enumerate(model.graph.node) if node.output[0] == old.output[0])
    model.graph.node[place].CopyFrom(new)


def _finish(model: onnx.ModelProto, path: Path) -> None:
    """Removes `Transpose` nodes and initializers that are no longer read, declares the operators' domain, and saves."""
    outputs = {output.name for output in model.graph.output}
    read = outputs | {name for node in model.graph.node for name in node.input}
    nodes = [node for node in model.graph.node if node.op_type != "Transpose" or node.output[0] in read]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    if CONTRIB not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    save(model, path)
