"""The command line, run on the built-in demo model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("typer", reason="the command line needs: pip install 'florence-onnx[cli]'")
pytest.importorskip("onnxruntime", reason="the demo model runs on ONNX Runtime: pip install 'florence-onnx[cpu]'")

from typer.testing import CliRunner, Result

from florence_onnx import __version__, tasks
from florence_onnx.bundles.bundle import DEMO_DIRECTORY
from florence_onnx.commands.demo import SAMPLES
from florence_onnx.commands.main import app

REPOSITORY = Path(__file__).parents[2]
SCENES = [str(SAMPLES / f"scene-{number}.png") for number in (1, 2)]

needs_demo = pytest.mark.skipif(not DEMO_DIRECTORY.is_dir(), reason="the demo bundle is not built in this checkout")


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _lines(result: Result) -> list[dict[str, object]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@needs_demo
def test_demo_writes_the_annotated_image_and_prints_the_answer(tmp_path: Path) -> None:
    output = tmp_path / "boxes.png"
    result = _run("demo", "--output", output)
    assert result.exit_code == 0, result.output
    truth = json.loads((SAMPLES / "samples.json").read_text(encoding="utf-8"))[0]
    answer = json.loads(result.stdout)
    assert sorted(box["label"] for box in answer["results"]["bboxes"]) == sorted(o["label"] for o in truth["objects"])
    assert answer["image"] is None
    with Image.open(output) as drawn:
        assert drawn.size == tuple(truth["size"])


@needs_demo
def test_demo_says_why_it_cannot_write(tmp_path: Path) -> None:
    result = _run("demo", "--output", tmp_path / "no" / "such" / "folder.png")
    assert result.exit_code == 2 and "error: cannot write" in result.stderr
    result = _run("demo", "--output", tmp_path / "image.unknown")
    assert result.exit_code == 2 and "unknown file extension" in result.stderr


@needs_demo
def test_run_prints_readable_answers() -> None:
    result = _run("run", "<OD>", *SCENES)
    assert result.exit_code == 0, result.output
    assert f"{SCENES[0]}:\n" in result.stdout and f"{SCENES[1]}:\n" in result.stdout
    assert "red circle    x " in result.stdout
    assert result.stderr.splitlines() == [
        "The demo model only knows drawn shapes and words; for photographs, use run with --model."
    ]


@needs_demo
def test_run_prints_a_json_line_for_each_image() -> None:
    result = _run("run", "object-detection", *SCENES, "--json", "--beams", 1, "--max-new-tokens", 256)
    assert result.exit_code == 0, result.output
    assert [line["image"] for line in _lines(result)] == SCENES
    for line in _lines(result):
        assert set(line) == {"image", "results", "truncated"} and line["results"]["bboxes"]  # type: ignore[index]
        assert line["truncated"] is False


@needs_demo
def test_a_bad_image_is_reported_and_does_not_stop_the_rest(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = [SCENES[0], "missing.png", broken, SCENES[1]]
    result = _run("run", "caption", *images, "--json")
    assert result.exit_code == 1
    good, missing, damaged, last = _lines(result)
    assert good["image"] == SCENES[0] and last["image"] == SCENES[1]
    assert set(missing) == {"image", "error"} and "no such image file" in str(missing["error"])
    assert damaged["image"] == str(broken) and "not an image" in str(damaged["error"])
    assert "missing.png: no such image file" in result.stderr
    assert "2 of 4 images could not be read" in result.stderr

    readable = _run("run", "caption", *images)
    assert readable.exit_code == 1
    assert "no such" not in readable.stdout and "missing.png: no such image file" in readable.stderr


@needs_demo
@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are a POSIX thing")
def test_answers_go_to_the_pipe_and_the_progress_bar_to_the_terminal() -> None:
    import pty

    terminal, error_stream = pty.openpty()
    command = [sys.executable, "-m", "florence_onnx", "run", "caption", *SCENES, "--json", "--beams", "1"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=error_stream, check=True
    )
    os.close(error_stream)
    assert [json.loads(line)["image"] for line in result.stdout.splitlines()] == SCENES
    assert b"images" in os.read(terminal, 65536)
    os.close(terminal)


@needs_demo
def test_run_draws_every_image_into_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    result = _run("run", "object-detection", *SCENES, SCENES[0], "--draw", folder)
    assert result.exit_code == 0, result.output
    names = ["scene-1-2.object-detection.png", "scene-1.object-detection.png", "scene-2.object-detection.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with Image.open(folder / names[0]) as drawn, Image.open(SCENES[0]) as original:
        assert drawn.size == original.size and drawn.tobytes() != original.convert("RGB").tobytes()


@needs_demo
@pytest.mark.parametrize(
    ("task", "arguments"),
    [
        ("ocr-with-region", []),
        ("region-proposal", []),
        ("open-vocabulary-detection", ["--text", "red circle"]),
        ("referring-expression-segmentation", ["--text", "red circle"]),
        ("region-to-segmentation", ["--region", "430,364,592,539"]),
        ("region-to-category", ["--region", "430,364,592,539"]),
    ],
)
def test_run_prints_every_kind_of_result(task: str, arguments: list[str]) -> None:
    readable = _run("run", task, SCENES[0], *arguments)
    assert readable.exit_code == 0, readable.output
    assert len(readable.stdout.splitlines()) > 1 and "nothing found" not in readable.stdout
    as_json = _run("run", task, SCENES[0], *arguments, "--json")
    assert _lines(as_json)[0]["results"]


@needs_demo
def test_a_truncated_answer_is_marked() -> None:
    result = _run("run", "object-detection", SCENES[0], "--max-new-tokens", 8)
    assert "cut off at the token limit" in result.stderr


def test_a_deadline_ends_answers() -> None:
    result = _run("run", "object-detection", SCENES[0], "--deadline", 0)
    assert result.exit_code == 0 and "cut off at the deadline" in result.stderr
    line = json.loads(_run("run", "object-detection", SCENES[0], "--deadline", 0, "--json").stdout)
    assert line["truncated"] == "deadline" and line["results"] == {"bboxes": []}
    whole = json.loads(_run("run", "object-detection", SCENES[0], "--deadline", 3600, "--json").stdout)
    assert whole["truncated"] is False and whole["results"]["bboxes"]
    refused = _run("run", "object-detection", SCENES[0], "--deadline", -1)
    assert refused.exit_code != 0 and "deadline must be a number of seconds" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "objct-detection", "x.png"], 'did you mean "object-detection"'),
        (["run", "region-to-ocr", "x.png"], "needs a region"),
        (["run", "region-to-ocr", "x.png", "--region", "1,2,3"], "four integer bins"),
        (["run", "region-to-ocr", "x.png", "--region", "5,5,1,1"], "left of and above"),
        (["run", "region-to-ocr", "x.png", "--region", "0,0,640,1480"], "out of range"),
        (["run", "caption", "x.png", "--text", "cat"], "takes no text_input"),
        (["run", "open-vocabulary-detection", "x.png"], "needs text"),
        (["run", "open-vocabulary-detection", "x.png", "--text", " "], "blank"),
        (["run", "caption", "x.png", "--draw", "folder"], "nothing to draw"),
        (["run", "caption", "x.png", "--model", "no-such-model"], "no-such-model"),
        (["run", "object-detection", "x.png", "--draw", __file__], "cannot create the folder"),
        (["info", "no-such-model"], "no-such-model"),
    ],
)
def test_wrong_arguments_end_with_their_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert result.stdout == "" and not any(tmp_path.iterdir())


def test_tasks_lists_all_of_them() -> None:
    result = _run("tasks")
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()[1:]]
    assert [row[:2] for row in rows] == [[task.slug, task.token] for task in tasks.TASKS.values()]


@needs_demo
def test_info_is_json() -> None:
    result = _run("info")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["path"] == str(DEMO_DIRECTORY)


def test_a_precision_that_the_model_lacks_is_refused() -> None:
    assert json.loads(_run("info", "demo", "--precision", "fp16").stdout)["precision"] == "fp16"
    refused = _run("info", "demo", "--precision", "int8")
    assert refused.exit_code == 2 and "--precision int8" in refused.stderr


def test_version() -> None:
    assert _run("--version").stdout.strip() == __version__


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_without_its_packages_the_entry_point_says_what_to_install(package: str) -> None:
    # an environment without the package, as the import system sees it
    result = _python(f"import sys; sys.modules['{package}'] = None; from florence_onnx.__main__ import main; main()")
    assert result.returncode == 2
    assert result.stderr.strip() == f"{package} is not installed; run: pip install 'florence-onnx[cli]'"


def test_the_module_runs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "florence_onnx", "tasks"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert "region-to-ocr" in result.stdout


# ------------------------------------------------------------------------------------------------- generation options


@needs_demo
def test_run_takes_generation_options_in_json() -> None:
    options = ("--option", "max_new_tokens=4", "--option", "num_beams=2", "--option", "num_return_sequences=2")
    result = _run("run", "<CAPTION>", SCENES[0], "--json", *options)
    assert result.exit_code == 0, result.output
    (line,) = _lines(result)
    assert len(line["alternatives"]) == 1 and line["alternatives"][0] != line["results"]  # type: ignore[arg-type, index]
    shown = _run("run", "<CAPTION>", SCENES[0], *options)
    assert "  answer 2:\n" in shown.stdout
    sampled = ("--option", "do_sample=true", "--option", "temperature=4.0", "--option", "top_k=0")
    answers = [
        _lines(_run("run", "<CAPTION>", SCENES[0], "--json", "--beams", 1, *sampled, "--option", f"seed={seed}"))
        for seed in (1, 1, 2)
    ]
    assert answers[0] == answers[1] != answers[2]


@needs_demo
@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("num_beems=1", "there is no option 'num_beems'; did you mean num_beams"),
        ("num_beam_groups=2", "num_beam_groups=2 is not possible"),
        ("num_beams=x", "num_beams must be a whole number"),
        ("num_beams", "an option is NAME=VALUE"),
        ("num_beams=", "an option is NAME=VALUE"),
    ],
)
def test_run_names_wrong_options(option: str, said: str) -> None:
    result = _run("run", "<CAPTION>", SCENES[0], "--option", option)
    assert result.exit_code == 2 and said in result.stderr


@needs_demo
def test_configure_changes_what_a_bundle_does_by_default(tmp_path: Path) -> None:
    copy = shutil.copytree(DEMO_DIRECTORY, tmp_path / "bundle")
    result = _run("configure", copy, "num_beams=1", "max_new_tokens=3", "early_stopping=never")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == {"num_beams": 1, "max_new_tokens": 3, "early_stopping": "never"}
    assert _run("run", "<CAPTION>", SCENES[0], "--model", copy).stderr.count("cut off at the token limit") == 1
    assert json.loads(_run("configure", copy, "max_new_tokens=", "early_stopping=").stdout) == {"num_beams": 1}
    assert json.loads(_run("configure", copy).stdout) == {"num_beams": 1}
    for arguments, said in (((copy, "num_beams=0"), "num_beams"), (("demo", "num_beams=1"), "cannot be configured")):
        wrong = _run("configure", *arguments)
        assert wrong.exit_code == 2 and said in wrong.stderr


@needs_demo
def test_run_takes_an_image_size_and_a_fit() -> None:
    result = _run("run", "<OD>", SCENES[0], "--image-size", "128x128", "--fit", "pad", "--json")
    assert result.exit_code == 0, result.output
    (padded,) = _lines(result)
    (stretched,) = _lines(_run("run", "<OD>", SCENES[0], "--json"))
    assert padded["results"] != stretched["results"], "the scene is not square"
    wrong = _run("run", "<OD>", SCENES[0], "--image-size", "64")
    assert wrong.exit_code == 2
    assert "this model reads images of 128x128 pixels, not 64x64" in wrong.stderr
    assert _run("run", "<OD>", SCENES[0], "--image-size", "64x").exit_code == 2
    fit = _run("run", "<OD>", SCENES[0], "--fit", "crop")
    assert fit.exit_code == 2 and "fit must be 'stretch' or 'pad', got 'crop'" in fit.stderr


@needs_demo
def test_info_lists_the_image_sizes() -> None:
    result = _run("info", "demo")
    assert result.exit_code == 0, result.output
    (size,) = json.loads(result.stdout)["image_sizes"]
    assert (size["image_size"], size["num_image_tokens"], size["is_loaded"]) == ([128, 128], 65, True)


def test_run_takes_labels_and_choices() -> None:
    result = _run("run", "<OD>", SCENES[0], "--labels", "yellow star, kite", "--json")
    line = json.loads(result.stdout)
    assert {box["label"] for box in line["results"]["bboxes"]} <= {
        "yellow star",
        "kite",
    } and "choice_logprobs" not in line
    asked = ["run", "region-to-category", SCENES[0], "--region", "430,367,591,537", "--choices", "star,circle"]
    line = json.loads(_run(*asked, "--json").stdout)
    assert line["results"] == "circle" and list(line["choice_logprobs"]) == ["circle", "star"]
    readable = _run(*asked).stdout
    assert readable.splitlines()[1].strip() == "circle" and readable.splitlines()[3].endswith("  star")
    option = 'constrain={"choices": ["circle"]}'
    assert json.loads(_run("run", "caption", SCENES[0], "--json", "--option", option).stdout)["results"] == "circle"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["<OD>", "--labels", "a", "--choices", "b"], "--labels and --choices exclude each other"),
        (["<OD>", "--labels", "a", "--option", 'constrain={"text": {}}'], "exclude each other"),
        (["caption", "--labels", "a"], "text without labels"),
        (["<OD>", "--labels", "a,,b"], "text that is not blank"),
        (["<OD>", "--option", "constrain=3"], "constrain must be a Grammar"),
    ],
)
def test_wrong_labels_and_choices_are_named(arguments: list[str], said: str) -> None:
    result = _run("run", arguments[0], SCENES[0], *arguments[1:])
    assert result.exit_code == 2 and said in result.stderr
