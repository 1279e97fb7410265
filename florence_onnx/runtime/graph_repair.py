"""Repairs, in memory, a defect of published decoders that ONNX Runtime refuses to load.

`onnxruntime.transformers.float16`, applied to a merged decoder with `keep_io_types`, casts the outputs of the `If` node
outside it. It renames the `If` node's outputs and, in both branches, the values that they come from, but not the list
of what a branch returns: that still names the outputs of the whole graph. ONNX Runtime takes them for values of the
outer graph and refuses to return those from a branch. The fp16 and q4f16 decoders of `onnx-community/Florence-2-base`
and `-base-ft` are such files.

Only the lists of outputs are rewritten, in the protobuf encoding itself, since the package `onnx` is no dependency. The
weights are copied as they are, or stay in their files. Fields and wire types are those of onnx.proto and of protobuf's
encoding.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from florence_onnx.errors import CorruptGraphError

REFUSED = "is an outer scope value being returned directly"
"""Part of ONNX Runtime's message."""

Chunks = list["memoryview | bytes"]
"""A message in parts, whose concatenation is its encoding; so that weights are copied only once."""

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12  # of GraphProto
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE, _ATTRIBUTE = 1, 2, 4, 5  # of NodeProto
_SUBGRAPH = 6  # of AttributeProto
_VALUE_NAME, _TENSOR_NAME = 1, 8  # of ValueInfoProto and TensorProto

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


def repair(path: Path) -> bytes:
    """Reads an ONNX file, and lets each branch of an `If` node return values of its own.

    What a branch returns without having it is replaced by the value that it computes under the name of the `If` node's
    output, or, where there is none, by a copy (`Identity`) of the outer value. The types of replaced outputs are left
    out: ONNX Runtime infers them.

    Args:
        path: The file; external data is not read.

    Returns:
        The repaired model. It is the same model if there is nothing to repair.

    Raises:
        CorruptGraphError: The file is not in the encoding of protobuf.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        view = memoryview(content)
        try:
            return b"".join(_rewrite(view, _GRAPH, _repair_graph))
        except (IndexError, ValueError) as error:
            raise CorruptGraphError(f"{path} is damaged ({error}); export or download it again") from error
        finally:
            view.release()


def _repair_graph(graph: memoryview) -> Chunks:
    return _rewrite(graph, _NODE, _repair_node)


def _repair_node(node: memoryview) -> Chunks:
    if _texts(node, _OP_TYPE) != ["If"]:
        return [node]
    outputs = _texts(node, _NODE_OUTPUT)

    def repair_attribute(attribute: memoryview) -> Chunks:
        return _rewrite(attribute, _SUBGRAPH, lambda branch: _repair_branch(branch, outputs))

    return _rewrite(node, _ATTRIBUTE, repair_attribute)


def _repair_branch(branch: memoryview, if_outputs: Sequence[str]) -> Chunks:
    """Makes every output a value of the branch; `if_outputs` are the names that the outer graph reads them by."""
    own = {name for node in _payloads(branch, _NODE) for name in _texts(node, _NODE_OUTPUT)}
    own |= {name for tensor in _payloads(branch, _INITIALIZER) for name in _texts(tensor, _TENSOR_NAME)}
    names = iter(if_outputs)
    copies: Chunks = []

    def repair_output(output: memoryview) -> Chunks:
        name, outer_name = _texts(output, _VALUE_NAME)[0], next(names)
        if name in own:
            return [output]
        if outer_name not in own:
            outer_name = f"{name}/returned"
            copies.extend(_field(_NODE, _identity(name, outer_name)))
        return _text(_VALUE_NAME, outer_name)

    return [*_rewrite(branch, _OUTPUT, repair_output), *copies]


def _identity(source: str, target: str) -> Chunks:
    return [*_text(_NODE_INPUT, source), *_text(_NODE_OUTPUT, target), *_text(_OP_TYPE, "Identity")]


# ------------------------------------------------------------------------------------------------------------ encoding


class _Field(NamedTuple):
    number: int
    whole: memoryview
    """Key, length and payload."""
    payload: memoryview


def _fields(message: memoryview) -> Iterator[_Field]:
    place = 0
    while place < len(message):
        start = place
        key, place = _varint(message, place)
        wire = key & 7
        size = 0
        if wire == _VARINT:
            end = _varint(message, place)[1]
        else:
            size, place = _varint(message, place) if wire == _BYTES else (_FIXED_SIZES.get(wire, -1), place)
            end = place + size
        if size < 0 or end > len(message):
            raise ValueError(f"no protobuf message: wire type {wire} at byte {start}")
        yield _Field(key >> 3, message[start:end], message[place:end])
        place = end


def _payloads(message: memoryview, number: int) -> Iterator[memoryview]:
    return (field.payload for field in _fields(message) if field.number == number)


def _texts(message: memoryview, number: int) -> list[str]:
    return [bytes(payload).decode() for payload in _payloads(message, number)]


def _rewrite(message: memoryview, number: int, change: Callable[[memoryview], Chunks]) -> Chunks:
    """Changes the payloads of one field, wherever it occurs in a message, and keeps everything else."""
    chunks: Chunks = []
    for field in _fields(message):
        chunks += _field(number, change(field.payload)) if field.number == number else [field.whole]
    return chunks


def _field(number: int, payload: Chunks) -> Chunks:
    return [_encode(number << 3 | _BYTES), _encode(sum(map(len, payload))), *payload]


def _text(number: int, text: str) -> Chunks:
    return _field(number, [text.encode()])


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    """An unsigned integer of 7 bits a byte, least significant first, and the place behind it."""
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
