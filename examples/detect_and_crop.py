"""Detects objects in an image and saves each one as an image of its own.

    python examples/detect_and_crop.py car.jpg crops/
    python examples/detect_and_crop.py car.jpg crops/ --find "a red kite"

Without `--find` all objects of the task `object-detection` are saved; with it, what `open-vocabulary-detection` finds.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from florence_onnx import BoundingBox, Florence2, tasks


def corners(box: BoundingBox, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Converts a box to the whole pixels that `PIL.Image.crop` takes.

    Args:
        box: Top-left corner, width and height, float pixels.
        size: (width, height) of the image.

    Returns:
        `(left, top, right, bottom)`, within the image and at least one pixel wide and high.
    """
    left = min(max(0, round(box.x)), size[0] - 1)
    top = min(max(0, round(box.y)), size[1] - 1)
    right = min(max(left + 1, round(box.x + box.w)), size[0])
    bottom = min(max(top + 1, round(box.y + box.h)), size[1])
    return left, top, right, bottom


def main() -> int:
    """Reads the arguments, saves the crops, and returns the exit code: 1 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="path or URL of the image")
    parser.add_argument("output", type=Path, help="folder for the crops")
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    parser.add_argument("--find", metavar="TEXT", help="what to look for")
    arguments = parser.parse_args()

    model = Florence2.from_pretrained(arguments.model)
    image = model.encode(arguments.image)
    if arguments.find:
        boxes = model.run(tasks.OPEN_VOCABULARY_DETECTION, image, text_input=arguments.find).results.bboxes
    else:
        boxes = model.run(tasks.OBJECT_DETECTION, image).results.bboxes

    arguments.output.mkdir(parents=True, exist_ok=True)
    for number, box in enumerate(boxes, start=1):
        # labels are generated text: keep only what is safe in a file name
        label = re.sub(r"[^\w-]+", "-", box.label).strip("-")[:40] or "object"
        path = arguments.output / f"{number:02}-{label}.png"
        image.source_image.crop(corners(box, image.size)).save(path)
        print(path)
    return 0 if boxes else 1


if __name__ == "__main__":
    sys.exit(main())
