"""`florence-onnx detect`, and `--tiles`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs: pip install 'florence-onnx[cli]'")
pytest.importorskip("onnxruntime", reason="the demo model runs on ONNX Runtime: pip install 'florence-onnx[cpu]'")

from PIL import Image
from typer.testing import CliRunner, Result

from florence_onnx import Florence2, GenerationOptions, Tiles
from florence_onnx.commands.demo import SAMPLES
from florence_onnx.commands.main import app

SCENES = [str(SAMPLES / f"scene-{number}.png") for number in (1, 2)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_json_has_what_python_has(tmp_path: Path) -> None:
    result = run("detect", "circle, square", *SCENES, tmp_path / "no.png", "--json", "--beams", 1, "--draw", tmp_path)
    assert result.exit_code == 1 and "1 of 3 images could not be read" in result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    model = Florence2.from_pretrained("demo", device="cpu")
    for line, image in zip(lines, SCENES, strict=False):
        found = model.detect(image, ["circle", "square"], options=GenerationOptions(num_beams=1)).to_dict()
        assert line["image"] == image and line["results"]["square"] == []
        assert [box["x"] for box in line["results"]["circle"]] == [box["x"] for box in found["results"]["circle"]]
        assert line["presence"]["square"] is None
        assert line["presence"]["circle"] == pytest.approx(found["presence"]["circle"], rel=1e-3)
    assert "no such image" in lines[2]["error"]
    with Image.open(tmp_path / "scene-1.open-vocabulary-detection.png") as drawn, Image.open(SCENES[0]) as image:
        assert drawn.size == image.size


def test_text_says_what_is_not_there() -> None:
    result = run("detect", "circle,square", SCENES[0], "--min-score", 0.01)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("  circle  x") == 2 and "  square: not found" in result.stdout
    none = run("detect", "circle", SCENES[0], "--min-score", 0.99)
    assert "circle: not found" in none.stdout
    absent = run("detect", "circle", SCENES[0], "--absent", "area", "--threshold", 2)
    assert "circle: not found" in absent.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detect", "car,,dog", SCENES[0]], "class 2 of 3"),
        (["detect", "car", SCENES[0], "--absent", "guess"], "absent must be one of"),
        (["detect", "car", SCENES[0], "--task", "ocr"], "cannot find a class"),
        (["detect", "car", SCENES[0], "--tiles", "many"], "--tiles"),
        (["detect", "car", SCENES[0], "--tiles", "768,0.1,half"], "--tiles"),
        (["run", "object-detection", SCENES[0], "--tiles", "8"], "at least 32"),
        (["run", "caption", SCENES[0], "--tiles", "64"], "cannot be put together"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.stderr


def test_run_in_tiles() -> None:
    result = run("run", "object-detection", SCENES[0], "--tiles", "200,0.5,no-whole", "--json", "--beams", 1)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["results"]["bboxes"]
    model = Florence2.from_pretrained("demo", device="cpu")
    expected = model.run(
        "<OD>", SCENES[0], tiles=Tiles(200, 0.5, whole=False), options=GenerationOptions(num_beams=1)
    ).to_dict()["results"]["bboxes"]
    assert found == expected and found
