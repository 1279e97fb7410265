"""What scores are worth: `python -m benchmarks.quality.scores --scenes 500`.

The demo model looks for the shapes of drawn scenes that were made unclear, so that it is often wrong. Average precision with
its scores is compared with that of the same boxes with constant scores and with shuffled ones; a calibration is fitted on
every second scene and judged on the others. Written to a part of `answers.md`, and the plot to `docs/images`.
"""

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.results_file import PATH, write_part
from export.demo.questions import short_name
from export.demo.scenes import Scene, make_scene
from florence_onnx import Florence2, GenerationOptions, tasks
from florence_onnx.evaluating.asking import Asked, ask
from florence_onnx.evaluating.coco import Figures, Found, GroundTruth, read_ground_truth
from florence_onnx.evaluating.measuring import Evaluation, evaluate
from florence_onnx.evaluating.plotting import plot

SEED = 20261203
"""Of the scenes; training uses others."""
GREEDY = GenerationOptions(num_beams=1)
PLOT = PATH.parents[2] / "docs" / "images" / "reliability.png"


def degrade(image: Image.Image, rng: random.Random) -> Image.Image:
    """An image as a bad camera would take it: of few pixels, and with noise. The demo model is right about clear ones."""
    side = rng.choice((12, 16, 20, 28, 40, 64))
    small = image.resize((side, max(1, round(side * image.height / image.width))), Image.Resampling.BOX)
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 40), (small.height, small.width, 3))
    noisy = np.clip(np.asarray(small, dtype=np.float64) + noise, 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).resize(image.size, Image.Resampling.BILINEAR)


def write_scenes(folder: Path, num_scenes: int, seed: int) -> Path:
    """Draws unclear scenes into a folder; returns the file with their ground truth in COCO's form."""
    rng = random.Random(seed)
    scenes = [make_scene(rng) for _ in range(num_scenes)]
    names = sorted({short_name(shape) for scene in scenes for shape in scene.shapes})
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "categories": [{"id": number + 1, "name": name} for number, name in enumerate(names)],
        "annotations": [],
    }
    for number, scene in enumerate(scenes):
        name = f"scene-{number}.png"
        degrade(scene.image, rng).save(folder / name)
        width, height = scene.image.size
        content["images"].append({"id": number, "file_name": name, "width": width, "height": height})
        content["annotations"] += [
            {"image_id": number, "category_id": names.index(short_name(shape)) + 1, "bbox": box}
            for shape, box in zip(scene.shapes, _boxes(scene), strict=True)
        ]
    path = folder / "truth.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def _boxes(scene: Scene) -> list[list[float]]:
    width, height = scene.image.size
    return [
        [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
        for x0, y0, x1, y1 in (shape.box for shape in scene.shapes)
    ]


def with_scores(asked: Iterable[Asked], scores: Iterable[float]) -> list[Asked]:
    """The same answers with other scores, box by box in order: to see what scores are worth."""
    given = iter(scores)
    return [
        Asked(
            each.image_id,
            tuple(Found(box.image_id, box.category_id, box.bbox, next(given)) for box in each.found),
            each.others,
            each.error,
        )
        for each in asked
    ]


def compare(truth: GroundTruth, asked: Sequence[Asked], seed: int) -> dict[str, Figures]:
    """Figures of the same boxes with the model's scores, with constant ones and with shuffled ones."""
    scores = [box.score for each in asked for box in each.found]
    shuffled = random.Random(seed).sample(scores, len(scores))
    ways = {"the model's": scores, "constant (0.9)": [0.9] * len(scores), "shuffled": shuffled}
    return {
        way: evaluate(truth, with_scores(asked, given), tasks.OBJECT_DETECTION.slug).figures
        for way, given in ways.items()
    }


def report(ways: dict[str, Figures], found: Evaluation, arguments: str) -> str:
    """The part of `answers.md`."""
    fitted = found.fitted
    assert fitted is not None, "asked for"

    def lines() -> Iterator[str]:
        yield f"Written by `python -m benchmarks.quality.scores {arguments}`."
        yield ""
        yield (
            f"{found.num_images} drawn scenes, made unclear (`degrade`: 12 to 64 pixels wide, with noise), with "
            f"{found.figures.num_objects} shapes of {len(found.by_class)} classes, "
            f"`<OD>` by the demo model, greedy: {found.reliability.count} boxes. Figures by pycocotools."
        )
        yield ""
        yield "| scores | AP | AP50 | AP75 | AR |"
        yield "| --- | --- | --- | --- | --- |"
        for way, each in ways.items():
            values = (each.ap, each.ap50, each.ap75, each.ar)
            yield f"| {way} | {' | '.join('-' if value is None else f'{value:.3f}' for value in values)} |"
        yield ""
        yield (
            f"Reliability on the {fitted.before.count} boxes of every second scene: expected calibration error "
            f"{fitted.before.ece:.3f} as the model has its scores, {fitted.after.ece:.3f} with the calibration fitted on "
            f"the other scenes' {fitted.calibration.num_boxes} boxes (`docs/images/reliability.png`)."
        )

    return "\n".join(lines())


def main() -> None:
    """Draws, asks, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED)
    arguments = parser.parse_args()
    model = Florence2.from_pretrained("demo", device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        truth = read_ground_truth(write_scenes(Path(folder), arguments.scenes, arguments.seed))
        ids = list(truth.images)
        asked = list(ask(model, truth, Path(folder), ids, tasks.OBJECT_DETECTION, options=GREEDY))
    found = evaluate(truth, asked, tasks.OBJECT_DETECTION.slug, model.digest, calibrate=True)
    assert found.fitted is not None, "asked for"
    plot({"before": found.fitted.before, "after": found.fitted.after}, PLOT)
    text = report(compare(truth, asked, arguments.seed), found, f"--scenes {arguments.scenes} --seed {arguments.seed}")
    write_part("Scores", text)
    print(text)


if __name__ == "__main__":
    main()
