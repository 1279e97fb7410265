"""Images with margins (`fit="pad"`) in a batch: location tokens of prompts, and coordinates of answers.

Callers speak of places in their image, the model of places in what the vision encoder reads. Called by `model` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from florence_onnx.answers.placed import has_locations, to_source
from florence_onnx.batches import Request
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import FlorenceError
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import AnyImage, Failed, image_key
from florence_onnx.inference.ending import Seen
from florence_onnx.prediction import EncodedImage
from florence_onnx.tasks import Task, parse

EncodeAll = Callable[[Sequence[AnyImage], Preparation, Failed], dict[int, EncodedImage]]
Placed = tuple[Request, AnyImage]
"""A request with its image, which may be encoded already."""


def is_padded(image: AnyImage, preparation: Preparation) -> bool:
    """Whether the vision encoder sees an image with margins."""
    return image.is_padded if isinstance(image, EncodedImage) else preparation.fit == "pad"


def count_image_tokens(bundle: Bundle, image: AnyImage, preparation: Preparation) -> int:
    """N, the image tokens of an image."""
    if isinstance(image, EncodedImage):
        return image.num_image_tokens
    return bundle.resized(preparation.image_size).sizes.num_image_tokens


def place(pairs: Sequence[Placed], preparation: Preparation, encode_all: EncodeAll, failed: Failed) -> list[Placed]:
    """Gives requests that name places in images with margins the placement of their image.

    Args:
        pairs: Requests and their images.
        preparation: Of the images that are not encoded.
        encode_all: `Answering.encode_all`: such images are encoded now, because only then their size is known.
        failed: Gets the requests' own indices, and the error that concerns their image.

    Returns:
        All requests and images, those that were encoded in their place; without those that `failed` was told of.
    """
    keys = {image_key(image) for request, image in pairs if _needs_placement(request, image, preparation)}
    chosen = [row for row, (_, image) in enumerate(pairs) if image_key(image) in keys]

    def failed_here(indices: Sequence[int], error: FlorenceError) -> None:
        failed([pairs[chosen[index]][0].index for index in indices], error)

    found = encode_all([pairs[row][1] for row in chosen], preparation, failed_here) if chosen else {}
    by_row = {row: found.get(index) for index, row in enumerate(chosen)}
    placed: list[Placed] = []
    for row, (request, image) in enumerate(pairs):
        encoded = by_row.get(row)
        if encoded is not None:
            placed.append((replace(request, placement=encoded.placement if encoded.is_padded else None), encoded))
        elif row not in by_row:
            placed.append((request, image))
    return placed


def _needs_placement(request: Request, image: AnyImage, preparation: Preparation) -> bool:
    return is_padded(image, preparation) and has_locations(request.prompt)


def parse_placed(task: Task[Any], text: str, seen: Seen) -> Any:
    """The results of a generated text, in pixels of the source image.

    Raises:
        InputError: The image has margins, and the task's parser is one whose results cannot be mapped.
    """
    placement = seen.placement if isinstance(seen, EncodedImage) and seen.is_padded else None
    if placement is None:
        return parse(task, text, seen.size)
    return to_source(parse(task, text, placement.image_size), placement)
