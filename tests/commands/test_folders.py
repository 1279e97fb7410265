"""`florence-onnx run` on folders, caption files beside images, and `truncated` in its JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the command line needs: pip install 'florence-onnx[cli]'")
pytest.importorskip("onnxruntime", reason="the demo model runs on ONNX Runtime: pip install 'florence-onnx[cpu]'")

from typer.testing import CliRunner, Result

from florence_onnx import Florence2, tasks
from florence_onnx.commands.demo import SAMPLES
from florence_onnx.commands.main import app

SCENES = [SAMPLES / f"scene-{number}.png" for number in (1, 2)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["run", *map(str, arguments), "--beams", "1"])


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """`a.png`, `b.PNG`, a text, a hidden file, and `deep/c.png`."""
    folder = tmp_path / "photos"
    (folder / "deep").mkdir(parents=True)
    shutil.copy(SCENES[0], folder / "b.PNG")
    shutil.copy(SCENES[1], folder / "a.png")
    shutil.copy(SCENES[1], folder / "deep" / "c.png")
    (folder / "notes.md").write_text("no image")
    (folder / "._a.png").write_text("what macOS leaves beside an image")
    return folder


def names(result: Result) -> list[str]:
    return [Path(json.loads(line)["image"]).name for line in result.stdout.splitlines()]


def caption(image: Path) -> str:
    return str(Florence2.from_pretrained("demo", device="cpu").run(tasks.CAPTION, image).results)


def test_a_folder_is_the_list_of_its_images(photos: Path) -> None:
    result = run("caption", photos, SCENES[0], "--json")
    assert result.exit_code == 0, result.output
    assert names(result) == ["a.png", "b.PNG", "scene-1.png"]
    assert f"{photos}: 2 images, 2 other files ignored" in result.stderr


def test_folders_in_a_folder_are_searched_on_request(photos: Path) -> None:
    result = run("caption", photos, "--json", "--recursive")
    assert names(result) == ["a.png", "b.PNG", "c.png"]
    assert "3 images, 2 other files ignored" in result.stderr


def test_a_folder_without_images_says_so(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("no image")
    result = run("caption", tmp_path)
    assert result.exit_code == 2
    assert "has no images (1 other files); --recursive also searches" in result.stderr


def test_captions_are_written_beside_their_images(photos: Path) -> None:
    result = run("caption", photos, "--txt", "--recursive")
    assert result.exit_code == 0, result.output
    written = sorted(str(path.relative_to(photos)) for path in photos.rglob("*.txt"))
    assert written == ["a.txt", "b.txt", "deep/c.txt"]
    assert (photos / "a.txt").read_text(encoding="utf-8") == caption(SCENES[1]) + "\n"


def test_a_caption_that_is_there_is_kept_unless_told_otherwise(photos: Path) -> None:
    (photos / "a.txt").write_text("written by hand")
    result = run("caption", photos, "--txt", "--json")
    assert result.exit_code == 0
    assert names(result) == ["b.PNG"]  # the other was not even run
    assert "1 of 2 images have a caption file already and are skipped; --overwrite" in result.stderr
    assert (photos / "a.txt").read_text() == "written by hand"
    assert run("caption", photos, "--txt", "--json").stdout == ""  # all are there now
    assert names(run("caption", photos, "--txt", "--overwrite", "--json")) == ["a.png", "b.PNG"]
    assert (photos / "a.txt").read_text() != "written by hand"


def test_captions_go_to_a_folder_of_their_own(photos: Path, tmp_path: Path) -> None:
    result = run("caption", photos, "--txt", "--txt-dir", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.txt", "b.txt"]
    assert not list(photos.glob("*.txt"))


def test_two_images_never_share_a_caption_file(photos: Path) -> None:
    shutil.copy(SCENES[0], photos / "a.bmp.png")
    shutil.copy(SCENES[0], photos / "a.jpg")
    result = run("caption", photos, "--txt")
    assert result.exit_code == 2
    assert "would both be" in result.stderr and "a.jpg" in result.stderr and "a.png" in result.stderr
    assert not list(photos.glob("*.txt"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["object-detection", SCENES[0], "--txt"], "does not answer with text"),
        (["caption", SCENES[0], "--overwrite"], "needs --txt"),
        (["caption", SCENES[0], "--txt-dir", "out"], "needs --txt"),
        (["caption", "http://127.0.0.1:9/a.png", "--txt"], "give --txt-dir"),
    ],
)
def test_options_of_captions_that_cannot_work_are_refused(arguments: list[object], said: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.replace("│", " ").split())


def test_a_file_that_cannot_be_written_ends_the_command(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("caption", photos, "--txt", "--txt-dir", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot write" in result.stderr


def test_a_truncated_answer_is_marked_in_json_alone() -> None:
    result = run("object-detection", SCENES[0], "--json", "--max-new-tokens", 5)
    (line,) = map(json.loads, result.stdout.splitlines())
    assert line["truncated"] is True
    model = Florence2.from_pretrained("demo", device="cpu")
    assert set(model.run(tasks.OBJECT_DETECTION, SCENES[0]).to_dict()) == {"results", "image"}  # fal's JSON
