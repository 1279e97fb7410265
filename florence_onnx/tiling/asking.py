"""A task on an image, tile by tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from PIL import Image as PILImage

from florence_onnx import tasks
from florence_onnx.answers.locations import Region
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, Polygon, PolygonOutput
from florence_onnx.errors import InputError
from florence_onnx.generation.options import GenerationOptions, merge
from florence_onnx.generation.progress import first_reason
from florence_onnx.images import decoding
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tasks import Task
from florence_onnx.tiling import merging
from florence_onnx.tiling.pieces import Piece, pieces_of
from florence_onnx.tiling.tiles import TileBox, Tiles

SCORED = GenerationOptions(scores=True, num_return_sequences=1)


class Model(Protocol):
    """What is needed of `Florence2`."""

    @property
    def run_batch(self) -> Callable[..., Sequence[Prediction[Any]]]: ...


@dataclass(frozen=True)
class TilePrediction:
    """The answer about one tile."""

    box: TileBox
    """(x0, y0, x1, y1) of the tile in pixels of the image."""
    prediction: Prediction[Any]
    """In pixels of the tile."""


@dataclass(frozen=True)
class TiledPrediction(Prediction[Any]):
    """An answer that was merged from those about tiles. Its text and tokens are those of all tiles, one after another."""

    tiles: tuple[TilePrediction, ...] = ()
    """What was merged; the whole image, if it was asked, is the last."""


def run(
    model: Model,
    task: Task[Any],
    image: decoding.ImageInput | EncodedImage,
    tiles: Tiles,
    text_input: str | None = None,
    region: Region | str | None = None,
    options: GenerationOptions | None = None,
    **others: Any,
) -> Prediction[Any]:
    """Runs a task on the tiles of an image, in one batch; arguments and errors as for `Florence2.run`.

    The text of `<OCR>` is put together from the lines of `<OCR_WITH_REGION>`, since a text without places cannot be merged.
    """
    check(task, tiles)
    source = source_of(image)
    if tiles.fits(source.size):
        # `image`, not `source`: an encoded image is not encoded again
        texts, regions = [text_input], [region]
        return model.run_batch([task], [image], text_inputs=texts, regions=regions, options=options, **others)[0]
    asked = tasks.OCR_WITH_REGION if task == tasks.OCR else task
    boxes = [*tiles.boxes(source.size), *([(0, 0, *source.size)] if tiles.whole else [])]
    crops = [source.crop(box) for box in boxes]
    scored = SCORED if options is None else merge(options, SCORED)
    texts = [text_input] * len(crops)
    answers = model.run_batch(asked, crops, text_inputs=texts, options=scored, **others)
    pieces = [
        piece
        for index, (box, answer) in enumerate(zip(boxes, answers, strict=True))
        for piece in pieces_of(answer.results, box, source.size, is_whole=tiles.whole and index == len(boxes) - 1)
    ]
    results = _results(merging.merge(pieces, tiles, source.size), answers[0].results)
    if task == tasks.OCR:
        results = "\n".join(quad.label for quad in results.quad_boxes)
    return _prediction(task, results, source, boxes, answers)


def check(task: Task[Any], tiles: object) -> None:
    """Raises InputError for a task whose answers about tiles cannot be merged, and for what is no `Tiles`."""
    if not isinstance(tiles, Tiles):
        raise InputError(f"tiles must be a florence_onnx.Tiles, such as Tiles(size=768), got {tiles!r}")
    if task.takes_region:
        raise InputError(f"{task.slug} is about a region of the image: crop the image instead of using tiles")
    if not task.has_image and task != tasks.OCR:
        raise InputError(
            f"{task.slug} answers with a text about the whole image, which cannot be put together from tiles"
        )


def source_of(image: decoding.ImageInput | EncodedImage) -> PILImage.Image:
    """An image as RGB, which is decoded unless it is already encoded."""
    return image.source_image if isinstance(image, EncodedImage) else decoding.load(image, copy=True)


def _results(pieces: Sequence[Piece], like: object) -> Any:
    """Pieces as results of the class that a tile's answer has."""
    if isinstance(like, OCRBoundingBox):
        return OCRBoundingBox(tuple(piece.items[0] for piece in merging.in_reading_order(pieces)))
    polygons = tuple(
        replace(item, instance=number)
        for number, piece in enumerate(piece for piece in pieces if isinstance(piece.items[0], Polygon))
        for item in piece.items
    )
    if isinstance(like, PolygonOutput):
        return PolygonOutput(polygons)
    boxes = tuple(piece.items[0] for piece in pieces if not isinstance(piece.items[0], Polygon))
    return BoundingBoxes(boxes, polygons)


def _prediction(
    task: Task[Any],
    results: Any,
    source: PILImage.Image,
    boxes: Sequence[TileBox],
    answers: Sequence[Prediction[Any]],
) -> TiledPrediction:
    return TiledPrediction(
        results=results,
        task=task,
        text="\n".join(answer.text for answer in answers),
        token_ids=tuple(token for answer in answers for token in answer.token_ids),
        truncated=first_reason(answer.truncated for answer in answers),
        source_image=source,
        token_logprobs=tuple(value for answer in answers for value in answer.token_logprobs or ()),
        tiles=tuple(TilePrediction(*pair) for pair in zip(boxes, answers, strict=True)),
    )
