"""The weights of all graphs of a bundle in one file, each stored once.

The text encoder and the decoder both read the token embedding, and it is the language model head too. ONNX lets several
graphs refer to one file of external data, which ONNX Runtime maps into memory instead of copying it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import set_external_data

MIN_BYTES = 1024
"""Smaller tensors stay inside the graph, where shape inference can read them."""
ALIGNMENT = 4096
"""Alignment of the offsets, in bytes: a page, so that a tensor can be mapped without a copy."""
SMALL_ALIGNMENT = 64
"""Alignment of tensors smaller than a page: a cache line."""


def gather_weights(paths: Sequence[Path], weights: Path) -> None:
    """Moves the large tensors of several graphs to one file of external data.

    Args:
        paths: The `.onnx` files, all in one directory; they are rewritten.
        weights: The file to write, in the same directory.
    """
    places: dict[bytes, tuple[int, int]] = {}
    with weights.open("wb") as file:
        for path in paths:
            model = onnx.load(str(path))
            for tensor in model.graph.initializer:
                _move(tensor, file, weights.name, places)
            onnx.save(model, str(path))
            path.with_name(path.name + "_data").unlink(missing_ok=True)


def _move(tensor: TensorProto, file: BinaryIO, location: str, places: dict[bytes, tuple[int, int]]) -> None:
    data = numpy_helper.to_array(tensor).tobytes()
    if len(data) < MIN_BYTES:
        return
    key = hashlib.sha256(data).digest()
    if key not in places:
        alignment = ALIGNMENT if len(data) >= ALIGNMENT else SMALL_ALIGNMENT
        file.write(bytes(-file.tell() % alignment))
        places[key] = (file.tell(), len(data))
        file.write(data)
    tensor.raw_data = data  # set_external_data accepts raw tensors only
    set_external_data(tensor, location, *places[key])
    tensor.ClearField("raw_data")
