"""Repairs, in memory, a defect of published decoders that ONNX Runtime refuses to load.

`onnxruntime.transformers.float16`, applied to a merged decoder with `keep_io_types`, casts the outputs of the `If` node
outside it. It renames the `If` node's outputs and, in both branches, the values that they come from, but not the list
of what a branch returns: that still names the outputs of the whole graph. ONNX Runtime takes them for values of the
outer graph and refuses to return those from a branch. The fp16 and q4f16 decoders of `onnx-community/Florence-2-base`
and `-base-ft` are such files.

Only the lists of outputs are rewritten, in the protobuf encoding itself, since the package `onnx` is no dependency.
Weights are copied as they are, those in other files into the model. Fields and wire types are those of onnx.proto and of
protobuf's encoding.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from florence_onnx.errors import BundleFileMissingError, CorruptGraphError, ProviderError

REFUSED = "is an outer scope value being returned directly"
"""Part of ONNX Runtime's message."""

Chunks = list["memoryview | bytes"]
"""A message in parts, whose concatenation is its encoding; so that weights are copied only once."""
Change = Callable[[memoryview], Chunks]
"""Makes of the payload of a field another one."""
MAX_BYTES = 2**31 - 1
"""protobuf's limit for a message."""

_GRAPH = 7  # of ModelProto
_NODE, _INITIALIZER, _OUTPUT = 1, 5, 12  # of GraphProto
_NODE_INPUT, _NODE_OUTPUT, _OP_TYPE, _ATTRIBUTE = 1, 2, 4, 5  # of NodeProto
_SUBGRAPH = 6  # of AttributeProto
_VALUE_NAME = 1  # of ValueInfoProto
_TENSOR_NAME, _RAW_DATA, _EXTERNAL_DATA, _DATA_LOCATION = 8, 9, 13, 14  # of TensorProto
_ENTRY_KEY, _ENTRY_VALUE = 1, 2  # of StringStringEntryProto

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}


def repair(path: Path) -> bytes:
    """Reads an ONNX file, and lets each branch of an `If` node return values of its own.

    A branch that returns an output of the whole graph gets the value that it computes under the name of the `If` node's
    output instead: the defect above. One that returns another value of the outer graph gets a copy of it (`Identity`).
    The types of replaced outputs are left out: ONNX Runtime infers them.

    Args:
        path: The file, with its external data beside it.

    Returns:
        The repaired model, without external data. It is the content of the file if there is nothing to change.

    Raises:
        BundleFileMissingError: The external data is missing.
        CorruptGraphError: The file is not in the encoding of protobuf, or its external data is too short or lies elsewhere.
        ProviderError: It has more than `MAX_BYTES` bytes.
    """
    external = cache(partial(_external_data, path))
    change = {_GRAPH: partial(_repair_graph, partial(_inline, external))}
    try:
        chunks = _rewrite(_map(path), change)
    except (IndexError, KeyError, ValueError) as error:
        raise CorruptGraphError(f"{path} is damaged ({error}); export or download it again") from error
    size = sum(map(len, chunks))
    if size > MAX_BYTES:
        raise ProviderError(
            f"{path} has branches that return values of the outer graph, which ONNX Runtime refuses, and with {size} bytes it "
            "is too large to be repaired in memory; choose another precision of the model"
        )
    return b"".join(chunks)


def _map(path: Path) -> memoryview:
    with path.open("rb") as file:
        # it is closed when the last view of it is gone
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _external_data(graph: Path, name: str) -> memoryview:
    """The content of a file that lies beside a graph."""
    if name != Path(name).name or not name:
        raise ValueError(f"its weights are to be read from {name!r}, which does not lie beside it")
    try:
        return _map(graph.parent / name)
    except FileNotFoundError as error:
        raise BundleFileMissingError(f"{graph.parent / name} is missing; export or download it again") from error


def _inline(external: Callable[[str], memoryview], tensor: memoryview) -> Chunks:
    """Puts the values of a tensor into the tensor itself: a model in memory has no place that ONNX Runtime would search."""
    entries = list(_payloads(tensor, _EXTERNAL_DATA))
    if not entries:
        return [tensor]
    where = {_text_of(entry, _ENTRY_KEY): _text_of(entry, _ENTRY_VALUE) for entry in entries}
    content = external(where["location"])
    start = int(where.get("offset", 0))
    end = start + int(where["length"]) if "length" in where else len(content)
    if not 0 <= start <= end <= len(content):
        raise ValueError(f"{where['location']} has {len(content)} bytes, of which {start} to {end} are to be read")
    kept = [field.whole for field in _fields(tensor) if field.number not in (_EXTERNAL_DATA, _DATA_LOCATION)]
    return [*kept, *_field(_RAW_DATA, [content[start:end]])]


# ------------------------------------------------------------------------------------------------------------ branches


def _repair_graph(inline: Change, graph: memoryview) -> Chunks:
    results = frozenset(_text_of(output, _VALUE_NAME) for output in _payloads(graph, _OUTPUT))
    return _rewrite(graph, {_NODE: partial(_repair_node, inline, results), _INITIALIZER: inline})


def _repair_node(inline: Change, results: frozenset[str], node: memoryview) -> Chunks:
    if _text_of(node, _OP_TYPE) != "If":
        return [node]
    outputs = [bytes(payload).decode() for payload in _payloads(node, _NODE_OUTPUT)]
    repair_branch = partial(_repair_branch, inline, results, outputs)
    return _rewrite(node, {_ATTRIBUTE: partial(_rewrite, changes={_SUBGRAPH: repair_branch})})


def _repair_branch(inline: Change, results: frozenset[str], if_outputs: Sequence[str], branch: memoryview) -> Chunks:
    """Makes every output of a branch a value of its own.

    Args:
        inline: What is done with its tensors.
        results: The outputs of the whole graph. A value of these is computed after the `If` node and cannot be what the branch
            is meant to return.
        if_outputs: The names by which the outer graph reads the outputs of the branch.
        branch: The branch.
    """
    own = {bytes(name).decode() for node in _payloads(branch, _NODE) for name in _payloads(node, _NODE_OUTPUT)}
    own |= {_text_of(tensor, _TENSOR_NAME) for tensor in _payloads(branch, _INITIALIZER)}
    names = iter(if_outputs)
    copies: Chunks = []

    def repair_output(output: memoryview) -> Chunks:
        name, outer_name = _text_of(output, _VALUE_NAME), next(names, "")
        if name in own:
            return [output]
        if name in results and outer_name in own:
            return _text(_VALUE_NAME, outer_name)
        copy = f"{outer_name}/returned"
        copies.extend(_field(_NODE, _identity(name, copy)))
        return _text(_VALUE_NAME, copy)

    return [*_rewrite(branch, {_OUTPUT: repair_output, _INITIALIZER: inline}), *copies]


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


def _text_of(message: memoryview, number: int) -> str:
    """A field of text that occurs once; empty where it is absent."""
    return bytes(next(_payloads(message, number), b"")).decode()


def _rewrite(message: memoryview, changes: Mapping[int, Change]) -> Chunks:
    """Changes the payloads of some fields, by number, wherever they occur in a message, and keeps everything else."""
    chunks: Chunks = []
    for field in _fields(message):
        change = changes.get(field.number)
        chunks += [field.whole] if change is None else _field(field.number, change(field.payload))
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
