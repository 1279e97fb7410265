"""Segments what a text or a box refers to, and writes a binary mask and the image with the mask over it.

    python examples/masks_over_photo.py car.jpg --text "the left door" --mask mask.png --overlay overlay.png
    python examples/masks_over_photo.py car.jpg --box 34,160,597,371 --mask mask.png

Without `--text` and `--box` every object that `object-detection` finds is segmented.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from florence_onnx import EncodedImage, Florence2, Polygon, Region, tasks


def rasterize(polygons: Sequence[Polygon], size: tuple[int, int]) -> Image.Image:
    """Draws polygons as a mask.

    Args:
        polygons: Outlines in pixels of the image.
        size: (width, height) of the image.

    Returns:
        An image of mode L: 255 inside any of the polygons, 0 elsewhere.
    """
    mask = Image.new("L", size)
    draw = ImageDraw.Draw(mask)
    for polygon in polygons:
        points = [(point.x, point.y) for point in polygon.points]
        if len(points) >= 3:
            draw.polygon(points, fill=255)
    return mask


def overlay(image: Image.Image, mask: Image.Image, colour: str, opacity: float) -> Image.Image:
    """Blends a colour over the masked part of an RGB image."""
    return Image.composite(Image.new("RGB", image.size, colour), image, mask.point(lambda value: value * opacity))


def parse_box(text: str) -> tuple[float, float, float, float]:
    """Parses `X1,Y1,X2,Y2`."""
    x1, y1, x2, y2 = map(float, text.split(","))
    return x1, y1, x2, y2


def segment(
    model: Florence2, image: EncodedImage, text: str | None, box: tuple[float, float, float, float] | None
) -> list[Polygon]:
    """Segments the text, the box, or else all detected objects."""
    if text is not None:
        prediction = model.run(tasks.REFERRING_EXPRESSION_SEGMENTATION, image, text_input=text)
        return list(prediction.results.polygons)
    boxes = [box] if box else []
    if not boxes:
        found = model.run(tasks.OBJECT_DETECTION, image).results.bboxes
        boxes = [(each.x, each.y, each.x + each.w, each.y + each.h) for each in found]
    if not boxes:
        return []
    regions = [Region.from_pixels(*corners, image.size) for corners in boxes]
    predictions = model.run_batch(tasks.REGION_TO_SEGMENTATION, [image] * len(regions), regions=regions)
    return [polygon for prediction in predictions for polygon in prediction.results.polygons]


def main() -> int:
    """Reads the arguments, writes the files, and returns the exit code: 1 if nothing was segmented."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="path or URL of the image")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--text", help="what to segment, in words")
    target.add_argument("--box", type=parse_box, metavar="X1,Y1,X2,Y2", help="what to segment, as a box in pixels")
    parser.add_argument("--mask", type=Path, default=Path("mask.png"), help="file for the mask (%(default)s)")
    parser.add_argument("--overlay", type=Path, help="file for the image with the mask over it")
    parser.add_argument("--colour", default="red", help="colour of the mask in the overlay (%(default)s)")
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    arguments = parser.parse_args()

    model = Florence2.from_pretrained(arguments.model)
    image = model.encode(arguments.image)
    polygons = segment(model, image, arguments.text, arguments.box)
    mask = rasterize(polygons, image.size)
    mask.save(arguments.mask)
    if arguments.overlay:
        overlay(image.source_image, mask, arguments.colour, opacity=0.5).save(arguments.overlay)
    share = mask.histogram()[255] / (image.size[0] * image.size[1])
    print(f"{len(polygons)} polygons, {share:.1%} of the image")
    return 0 if polygons else 1


if __name__ == "__main__":
    sys.exit(main())
