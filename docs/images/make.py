"""Draws the images of the manual pages from the demo model's answers: `python docs/images/make.py`, in the repository root."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from florence_onnx import Florence2, GenerationOptions
from florence_onnx.answers import draw
from florence_onnx.answers.results import BoundingBox, BoundingBoxes
from florence_onnx.parts import ItemPart

FOLDER = Path(__file__).parent
SAMPLE = FOLDER.parents[1] / "florence_onnx" / "demo" / "samples" / "scene-1.png"
NAMES = ["circle", "square", "a star"]
CAPTION_HEIGHT = 30


def beside(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Images of one size side by side, each below its caption."""
    width, height = panels[0][1].size
    sheet = Image.new("RGB", (len(panels) * (width + 8) - 8, height + CAPTION_HEIGHT), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for index, (caption, image) in enumerate(panels):
        sheet.paste(image, (index * (width + 8), CAPTION_HEIGHT))
        pen.text((index * (width + 8) + 4, 6), caption, fill="black", font=font)
    return sheet


def labelled(boxes: tuple[BoundingBox, ...]) -> BoundingBoxes:
    """The boxes with their scores in the labels."""
    return BoundingBoxes(tuple(BoundingBox(b.x, b.y, b.w, b.h, f"{b.label} {b.score:.3f}") for b in boxes))


def save(sheet: Image.Image, name: str) -> None:
    """Saves with a palette, which keeps the file small."""
    sheet.quantize(128).save(FOLDER / name, optimize=True)


def scores(model: Florence2) -> Image.Image:
    """Objects with their scores, and those above a score."""
    answer = model.run("<OD>", SAMPLE, options=GenerationOptions(scores=True))
    boxes = answer.results.bboxes
    least = round((min(b.score for b in boxes) + max(b.score for b in boxes)) / 2, 3)
    cut = answer.above(least).results.bboxes
    panels = [("scores=True", labelled(boxes)), (f"above({least})", labelled(cut))]
    return beside([(caption, draw.draw(answer.source_image, found)) for caption, found in panels])


def detecting(model: Florence2) -> Image.Image:
    """A list of classes, of which one is not there."""
    found = model.detect(SAMPLE, NAMES)
    absent = [name for name in NAMES if name not in found.present]
    panels = [(f"detect {', '.join(NAMES)}", found.source_image), (f"absent: {', '.join(absent)}", found.draw())]
    return beside(panels)


def stream(model: Florence2) -> Image.Image:
    """The boxes so far, whenever one is complete."""
    source, boxes, panels = Image.open(SAMPLE).convert("RGB"), [], []
    for part in model.stream("<OD>", SAMPLE, options=GenerationOptions(num_beams=1)):
        if isinstance(part, ItemPart):
            boxes.append(part.item)
            panels.append((f"box {len(boxes)}", draw.draw(source, BoundingBoxes(tuple(boxes)))))
    return beside(panels)


def main() -> None:
    """Draws all of them."""
    model = Florence2.from_pretrained("demo", device="cpu")
    for make in (scores, detecting, stream):
        save(make(model), f"{make.__name__}.png")


if __name__ == "__main__":
    main()
