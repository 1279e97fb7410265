"""Every script of `examples/`, run as its own process on the demo's samples: what it prints, what it writes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import descriptions

REPOSITORY = Path(__file__).parent.parent
EXAMPLES = REPOSITORY / "examples"
DEMO = REPOSITORY / "florence_onnx" / "demo"
SAMPLES = DEMO / "samples"
SCENE = SAMPLES / "scene-1.png"
"""A green circle, a red circle, a yellow star and the word ROCKET."""


def run(script: str, *arguments: str | Path, code: int = 0) -> str:
    """Runs an example and checks its exit code; returns what it printed."""
    process = subprocess.run(
        [sys.executable, EXAMPLES / script, *arguments],
        cwd=REPOSITORY,
        # the scripts import the installed package; in a checkout that is not installed, the checkout
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode == code, process.stderr
    assert "Traceback" not in process.stderr
    return process.stdout


def ground_truth(number: int) -> dict[str, object]:
    """What was drawn in a sample."""
    truth: dict[str, object] = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[number - 1]
    return truth


def test_every_example_is_tested_and_documented() -> None:
    """Each script has a test here, a docstring with its command, and `demo` as its default model."""
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    tests = Path(__file__).read_text(encoding="utf-8")
    assert len(scripts) == 9
    for name in scripts:
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        assert f'run("{name}"' in tests.replace("run(\n        ", "run("), name
        assert f"python examples/{name} " in source.split('"""')[1], name
        assert 'default="demo"' in source, name


def test_caption_folder(tmp_path: Path) -> None:
    """Captions are those that were drawn; a file that is not an image is reported and does not end the run."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    shutil.copy(SCENE, folder / "a.png")
    shutil.copy(SAMPLES / "scene-5.png", folder / "more" / "b.PNG")
    (folder / "broken.jpg").write_bytes(b"no image")
    run("caption_folder.py", folder, tmp_path / "captions.csv", "--batch-size", "2", code=1)
    with (tmp_path / "captions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["file", "caption"],
        ["a.png", ground_truth(1)["caption"]],
        ["more/b.PNG", ground_truth(5)["caption"]],
    ]


def test_caption_crops(tmp_path: Path) -> None:
    """A line for each box; sizes are those of the model, and the whole scene has the caption that was drawn."""
    boxes = [[0, 0, 384, 355], [86, 170, 144, 229], [10, 10, 10.4, 10.4]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    printed = run("caption_crops.py", SCENE, tmp_path / "boxes.json", "--image-size", "128").splitlines()
    lines = [json.loads(line) for line in printed]
    assert [line["box"] for line in lines] == boxes
    assert lines[0]["caption"] == ground_truth(1)["caption"]
    assert all(isinstance(line["caption"], str) for line in lines)
    run("caption_crops.py", SCENE, tmp_path / "boxes.json", "--image-size", "64", code=2)


def test_detect_and_crop(tmp_path: Path) -> None:
    """One crop for each object, of the object's size, named by its label."""
    printed = run("detect_and_crop.py", SCENE, tmp_path / "crops").splitlines()
    names = ["01-green-circle.png", "02-red-circle.png", "03-yellow-star.png"]
    assert [Path(line).name for line in printed] == names
    assert sorted(path.name for path in (tmp_path / "crops").iterdir()) == names
    with Image.open(tmp_path / "crops" / names[0]) as crop:
        assert np.allclose(crop.size, (58, 59), atol=1)
        red, green, blue = (int(value) for value in np.asarray(crop.convert("RGB"))[crop.height // 2, crop.width // 2])
        assert green > max(red, blue)


def test_detect_and_crop_finds_a_text(tmp_path: Path) -> None:
    """`--find` saves what the text names and nothing else."""
    run("detect_and_crop.py", SCENE, tmp_path, "--find", "red circle")
    assert [path.name for path in tmp_path.iterdir()] == ["01-red-circle.png"]


def test_ocr_to_text(tmp_path: Path) -> None:
    """The word that was drawn is in the text file, its position in the JSON; an image without text has an empty file."""
    printed = run("ocr_to_text.py", SCENE, SAMPLES / "scene-3.png", "--output", tmp_path, "--json")
    assert printed.splitlines() == [f"{tmp_path / 'scene-1.txt'}: 1 lines", f"{tmp_path / 'scene-3.txt'}: 0 lines"]
    assert (tmp_path / "scene-1.txt").read_text(encoding="utf-8") == "ROCKET\n"
    assert (tmp_path / "scene-3.txt").read_text(encoding="utf-8") == ""
    (line,) = json.loads((tmp_path / "scene-1.json").read_text(encoding="utf-8"))
    assert line["text"] == "ROCKET"
    assert [line[key] for key in "xywh"] == pytest.approx([22.8, 52.0, 264.6, 47.9], abs=2)


def test_masks_over_photo(tmp_path: Path) -> None:
    """The mask covers the circle that the text names, and the overlay differs from the image there only."""
    mask_file, overlay_file = tmp_path / "mask.png", tmp_path / "overlay.png"
    arguments = ("--text", "green circle", "--mask", mask_file, "--overlay", overlay_file, "--colour", "white")
    assert run("masks_over_photo.py", SCENE, *arguments).startswith("1 polygons, ")
    mask = np.asarray(Image.open(mask_file)) > 0
    assert mask.shape == (355, 384)
    assert mask[199, 115]  # the centre of the green circle
    assert mask.sum() == pytest.approx(np.pi * 29.2**2, rel=0.1)
    changed = (np.asarray(Image.open(overlay_file)) != np.asarray(Image.open(SCENE).convert("RGB"))).any(axis=2)
    assert not changed[~mask].any()
    assert changed[mask].all()


def test_serve_and_call() -> None:
    """A server is started, called and stopped; its answer is fal's JSON."""
    answer = json.loads(run("serve_and_call.py", SCENE))
    labels = [box["label"] for box in answer["results"]["bboxes"]]
    assert labels == ["green circle", "red circle", "yellow star"]
    assert set(answer["results"]["bboxes"][0]) == {"x", "y", "w", "h", "label"}


def test_mixed_batch() -> None:
    """One line for each question about each image, in order."""
    questions = ("--ask", "caption", "--ask", "ocr", "--ask", "open-vocabulary-detection=green star")
    lines = [
        json.loads(line) for line in run("mixed_batch.py", SCENE, SAMPLES / "scene-4.png", *questions).splitlines()
    ]
    assert [(Path(line["image"]).name, line["task"]) for line in lines] == [
        (name, task)
        for name in ("scene-1.png", "scene-4.png")
        for task in ("caption", "ocr", "open-vocabulary-detection")
    ]
    assert [line["results"] for line in lines[:2]] == [ground_truth(1)["caption"], "ROCKET"]
    assert [line["results"] for line in lines[3:5]] == [ground_truth(4)["caption"], "ZOO"]
    assert [box["label"] for box in lines[5]["results"]["bboxes"]] == ["green star"]


def test_own_task() -> None:
    """The parser of the script counts the boxes of each phrase."""
    printed = run("own_task.py", SCENE, "--text", "Two circles, a star and the word ROCKET.")
    assert printed.splitlines()[0] == "2 Two circles"


def test_verify_precision(tmp_path: Path) -> None:
    """A bundle agrees with itself to the last bit; weights with noise do not, and the exit code says so."""
    images = tmp_path / "images"
    images.mkdir()
    for number in (1, 4):
        shutil.copy(SAMPLES / f"scene-{number}.png", images)
    equal = run("verify_precision.py", "--images", images, "--min-equal", "1").splitlines()
    assert [line.split() for line in equal[1:]] == [
        [task, "2/2", "0", "1.000"] for task in ("caption", "object-detection", "ocr-with-region")
    ]

    noisy = tmp_path / "noisy"
    shutil.copytree(DEMO / "bundle", noisy)
    weights = np.fromfile(noisy / "weights.data", dtype=np.float16)
    embedding = weights[3235840 // 2 :][: 1568 * 128]  # the decoder's, which is its head as well
    embedding += np.random.default_rng(0).normal(0, embedding.astype(np.float32).std(), embedding.size)
    weights.tofile(noisy / "weights.data")
    files = descriptions.read(noisy)["files"]
    files["weights.data"]["sha256"] = hashlib.sha256((noisy / "weights.data").read_bytes()).hexdigest()
    descriptions.change(noisy, files=files)
    lines = run("verify_precision.py", noisy, "--images", images, "--min-equal", "1", code=1).splitlines()
    assert all(float(line.split()[2]) > 0.1 for line in lines[1:])
    assert any(line.split()[1] != "2/2" for line in lines[1:])
