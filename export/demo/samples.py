"""Writes the sample scenes that ship with the demo model: `python -m export.demo.samples`.

Eight images, from seeds that are used for nothing else, chosen to be varied and to compress well, and `samples.json`
with their ground truth in pixels.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import florence_onnx

from .metrics import to_pixels
from .questions import caption, detailed_caption, full_name, short_name
from .scenes import Box, Scene, Shape, make_scene

DEFAULT_DIRECTORY = Path(florence_onnx.__file__).parent / "demo" / "samples"


@dataclass(frozen=True)
class SampleSpec:
    """The parameters of one sample scene."""

    seed: int
    size: int  # 320, longer side in pixels
    num_shapes: int
    has_word: bool


SPECS = (
    SampleSpec(seed=900_100, size=384, num_shapes=3, has_word=True),
    SampleSpec(seed=900_213, size=320, num_shapes=2, has_word=True),
    SampleSpec(seed=900_310, size=320, num_shapes=4, has_word=False),
    SampleSpec(seed=900_409, size=384, num_shapes=1, has_word=True),
    SampleSpec(seed=900_510, size=320, num_shapes=3, has_word=False),
    SampleSpec(seed=900_613, size=384, num_shapes=3, has_word=True),
    SampleSpec(seed=900_712, size=256, num_shapes=2, has_word=False),
    SampleSpec(seed=900_801, size=320, num_shapes=2, has_word=True),
)


def draw_sample(spec: SampleSpec) -> Scene:
    """Makes the scene of a specification."""
    return make_scene(
        random.Random(spec.seed), spec.size, word_probability=float(spec.has_word), num_shapes=spec.num_shapes
    )


def describe(scene: Scene, file_name: str) -> dict[str, Any]:
    """Returns the ground truth of a scene for JSON, in pixels: boxes `[x0, y0, x1, y1]`, polygons `[x, y, …]`."""
    word = scene.word
    return {
        "file": file_name,
        "size": list(scene.size),
        "background": scene.background,
        "caption": caption(scene),
        "detailed_caption": detailed_caption(scene),
        "objects": [_describe_shape(shape, scene.size) for shape in scene.shapes],
        "word": {"text": word.text, "ink": word.ink, "box": _pixels(word.box, scene.size)} if word else None,
    }


def write_samples(directory: Path) -> None:
    """Writes the images and `samples.json`."""
    directory.mkdir(parents=True, exist_ok=True)
    truths = []
    for number, spec in enumerate(SPECS, start=1):
        scene = draw_sample(spec)
        name = f"scene-{number}.png"
        scene.image.save(directory / name, optimize=True)
        truths.append({**describe(scene, name), "seed": spec.seed})
    lines = ",\n".join(json.dumps(truth) for truth in truths)
    (directory / "samples.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _describe_shape(shape: Shape, size: tuple[int, int]) -> dict[str, Any]:
    width, height = size
    return {
        "label": short_name(shape),
        "description": full_name(shape),
        "category": shape.kind,
        "box": _pixels(shape.box, size),
        "polygon": [round(v, 1) for x, y in shape.outline() for v in (x * width, y * height)],
    }


def _pixels(box: Box, size: tuple[int, int]) -> list[float]:
    return [round(value, 1) for value in to_pixels(box, size)]


def main() -> None:
    """Command line: writes the samples."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_DIRECTORY)
    write_samples(parser.parse_args().out)


if __name__ == "__main__":
    main()
