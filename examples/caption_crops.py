"""Captions the parts of an image that boxes mark, as OmniParser does with the icons of a screenshot.

    python examples/caption_crops.py screenshot.png boxes.json --model BUNDLE --image-size 64 --fit pad

Each box is [x1, y1, x2, y2] in pixels. All crops are answered as one batch, greedily, with at most 20 tokens each. A model
that was exported with `--image-size 64` reads a crop in a small fraction of the time that it takes at 768 pixels.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from florence_onnx import Florence2, FlorenceError, GenerationOptions

OPTIONS = GenerationOptions(num_beams=1, max_new_tokens=20)


def cut(image: Image.Image, boxes: Sequence[Sequence[float]]) -> list[Image.Image]:
    """Cuts boxes out of an image; a box of less than a pixel is one pixel."""
    crops = []
    for left, top, right, bottom in boxes:
        x, y = int(left), int(top)
        crops.append(image.crop((x, y, max(x + 1, round(right)), max(y + 1, round(bottom)))))
    return crops


def main() -> int:
    """Reads the arguments, prints a line of JSON for each box, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="image file")
    parser.add_argument("boxes", type=Path, help="JSON file with a list of boxes")
    parser.add_argument("--model", default="demo", help="bundle directory, hub repository or demo (%(default)s)")
    parser.add_argument("--image-size", type=int, help="side in pixels at which crops are read (the model's default)")
    parser.add_argument("--fit", default="stretch", help="stretch or pad crops to that size (%(default)s)")
    arguments = parser.parse_args()

    boxes = json.loads(arguments.boxes.read_text(encoding="utf-8"))
    try:
        model = Florence2.from_pretrained(arguments.model, image_size=arguments.image_size, fit=arguments.fit)
        with Image.open(arguments.image) as image:
            crops = cut(image.convert("RGB"), boxes)
        predictions = model.run_batch("<CAPTION>", crops, options=OPTIONS, batch_size=max(1, len(crops)))
    except FlorenceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for box, prediction in zip(boxes, predictions, strict=True):
        print(json.dumps({"box": box, "caption": prediction.results}, ensure_ascii=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
