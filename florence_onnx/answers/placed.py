"""Answers about an image that has margins (`fit="pad"`): from the coordinates of the model's input to those of the image.

Florence-2's location bins divide what the vision encoder reads. Without margins that is the image, and the parsers return
its pixels. With margins the parsers are given the size of the model's input, and their results are mapped here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from florence_onnx.answers.locations import Size, dequantize, from_tokens, quantize, to_tokens
from florence_onnx.answers.results import BoundingBox, OCRBoundingBoxSingle, Point
from florence_onnx.errors import InputError
from florence_onnx.images.placement import Placement

R = TypeVar("R")

_RUN = re.compile(r"(?:<loc_\d+>)+")


def to_source(results: R, placement: Placement) -> R:
    """Maps all coordinates of a result to the source image, clipped to its edges.

    Args:
        results: Text, whose location tokens are mapped; or a dataclass of `florence_onnx.answers.results`, or one that
            consists of such, in pixels of `placement.image_size`.
        placement: Of the image.

    Raises:
        InputError: The result is of another type, as a parser of one's own may return.
    """
    if isinstance(results, str):
        mapped: Any = _to_source_text(results, placement)
    elif dataclasses.is_dataclass(results) or isinstance(results, tuple):
        mapped = _map(results, placement)
    else:
        raise InputError(
            f'fit="pad" cannot map a {type(results).__name__} back to the image: let the parser return text or the '
            'dataclasses of florence_onnx.answers.results, or use fit="stretch"'
        )
    found: R = mapped
    return found


def has_locations(text: str) -> bool:
    """Whether a text has location tokens."""
    return _RUN.search(text) is not None


def text_to_input(text: str, placement: Placement) -> str:
    """A text whose location tokens, x and y in turn, are bins of the source image, with those of the model's input instead.

    A bin becomes the bin of the model's input in which its middle is shown.
    """
    return _RUN.sub(lambda run: _map_run(run[0], placement.source_size, placement.image_size, placement.to_input), text)


def _to_source_text(text: str, placement: Placement) -> str:
    return _RUN.sub(
        lambda run: _map_run(run[0], placement.image_size, placement.source_size, placement.to_source), text
    )


def _map_run(run: str, size: Size, new_size: Size, move: Callable[[float, int], float]) -> str:
    bins = from_tokens(run)
    # A run may have an x without its y: it is mapped with a y of 0, which is dropped again.
    padded = [*bins, 0] if len(bins) % 2 else bins
    pixels = dequantize(padded, size).tolist()
    moved = [move(value, at % 2) for at, value in enumerate(pixels)]
    return to_tokens(quantize(moved, new_size).tolist()[: len(bins)])


def _map(value: Any, placement: Placement) -> Any:
    if isinstance(value, Point):
        return Point(_moved(value.x, placement, 0), _moved(value.y, placement, 1))
    if isinstance(value, tuple):
        return tuple(_map(each, placement) for each in value)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    changed = {each.name: _map(getattr(value, each.name), placement) for each in dataclasses.fields(value)}
    if isinstance(value, BoundingBox | OCRBoundingBoxSingle):
        changed |= _map_box(value, placement)
    return dataclasses.replace(value, **changed)


def _map_box(box: BoundingBox | OCRBoundingBoxSingle, placement: Placement) -> dict[str, float]:
    x1, y1 = _moved(box.x, placement, 0), _moved(box.y, placement, 1)
    x2, y2 = _moved(box.x + box.w, placement, 0), _moved(box.y + box.h, placement, 1)
    return {"x": x1, "y": y1, "w": x2 - x1, "h": y2 - y1}


def _moved(coordinate: float, placement: Placement, axis: int) -> float:
    """A coordinate in the source image as a float32 value, as results have them."""
    return float(np.float32(placement.to_source(coordinate, axis)))
