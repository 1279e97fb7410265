"""Makes the images of the manual pages from the demo model's answers: `python -m docs.images.make`, in the repository root.

The page of a server and the gallery are photographed in a browser, so that it needs chromium and playwright.
`reliability.png` is made by `benchmarks.quality.scores`.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from playwright.sync_api import Browser, expect, sync_playwright

from florence_onnx import Florence2, GenerationOptions
from florence_onnx.answers import draw
from florence_onnx.answers.results import BoundingBox, BoundingBoxes
from florence_onnx.parts import ItemPart
from tests.live_server import serve

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
    sheet.quantize(256).save(FOLDER / name, optimize=True)


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


def page(browser: Browser) -> Image.Image:
    """The page of a server after a list of classes was detected."""
    with serve() as server:
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto(server.url)
        expect(tab.locator("#image-name")).to_contain_text(SAMPLE.name)
        tab.select_option("#task", "detect-a-list")
        tab.fill("#text", "red circle\ngreen square\nyellow diamond")
        tab.click("#run")
        expect(tab.locator("#status")).to_have_text(re.compile("^Done"))
        return Image.open(io.BytesIO(tab.screenshot())).convert("RGB")


def gallery(browser: Browser) -> Image.Image:
    """The gallery of the samples and a damaged image, smaller."""
    with tempfile.TemporaryDirectory() as folder:
        for path in SAMPLE.parent.glob("*.png"):
            shutil.copy(path, folder)
        (Path(folder) / "damaged.png").write_bytes(b"no image")
        options = ["--task", "object-detection", "--scores", "--beams", "1", "--device", "cpu"]
        # its exit code is 1, since an image is damaged
        run("batch", ".", "--out", "rows.jsonl", *options, folder=folder, codes=(1,))
        run("convert", "rows.jsonl", "--to", "html", "--out", "gallery.html", folder=folder, codes=(0,))
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.goto((Path(folder) / "gallery.html").as_uri())
        tab.wait_for_function("[...document.images].every(image => image.complete)")
        return Image.open(io.BytesIO(tab.screenshot())).convert("RGB").resize((960, 675))


def run(*arguments: str, folder: str, codes: tuple[int, ...]) -> None:
    """Runs a command in a folder."""
    ended = subprocess.run([sys.executable, "-m", "florence_onnx", *arguments], cwd=folder, check=False)
    if ended.returncode not in codes:
        raise SystemExit(ended.returncode)


def main() -> None:
    """Makes all of them."""
    model = Florence2.from_pretrained("demo", device="cpu")
    for draw_answer in (scores, detecting, stream):
        save(draw_answer(model), f"{draw_answer.__name__}.png")
    with sync_playwright() as playwright:
        path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        for photograph in (page, gallery):
            save(photograph(browser), f"{photograph.__name__}.png")


if __name__ == "__main__":
    main()
