"""The export as a user runs it: what it writes, what it refuses, and that a failure leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from florence_onnx import (
    BundleNotFoundError,
    CheckpointError,
    Florence2,
    ImageNotFoundError,
    VerificationError,
)
from florence_onnx.bundles import bundle
from tests.command_line import run_here
from tests.conftest import NO_TORCH, Exported

torch = pytest.importorskip("torch", reason=NO_TORCH)
onnx = pytest.importorskip("onnx", reason=NO_TORCH)
from export.__main__ import main  # noqa: E402
from export.bundles import directories, writer  # noqa: E402
from export.graphs.plans import plans  # noqa: E402
from export.precisions.recipes import PRECISIONS, Recipe  # noqa: E402
from export.verification import checks  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
MINE = {"slug": "count", "token": "<COUNT>", "prompt": "How many {input}?", "needs": "text", "parser": "pure_text"}


def run_export(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in this process."""
    return run_here(main, *arguments)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.checkpoints import build_checkpoint

    return build_checkpoint(tmp_path_factory.mktemp("source") / "tiny-florence")


def test_the_command_line_writes_a_verified_bundle(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "export", str(source), str(output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(output)
    names = {path.name for path in output.iterdir()}
    assert names == {*bundle.GRAPHS, bundle.WEIGHTS, bundle.TOKENIZER, bundle.GENERATION_CONFIG, bundle.DESCRIPTION}
    described = json.loads((output / bundle.DESCRIPTION).read_text())
    assert set(described["verification"]["graphs"]) == set(bundle.GRAPHS)
    assert described["source"]["name"] == "tiny-florence"
    assert all(0 < error["max_rel"] < 1e-4 for error in described["verification"]["graphs"].values())
    for search in ("greedy", "beam-3"):
        tokens = described["verification"]["tokens"][search]
        assert tokens["equal"] == tokens["total"] > 0

    again = run_export(source, output)
    assert again.returncode == 1 and "--force" in again.stderr
    file = source.with_name("mine.json")
    file.write_text(json.dumps({"tasks": [MINE]}), encoding="utf-8")
    forced = run_export(source, output, "--force", "--precision", "fp16", "--task", "promptgen-v2.0", "--task", file)
    assert forced.returncode == 0, forced.stderr
    assert bundle.read(output).precision == "fp16"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "nothing but the bundle is left"
    check_own_tasks(output)


def check_own_tasks(output: Path) -> None:
    """That a bundle carries PromptGen's tasks and `MINE`, and answers them."""
    slugs = ["generate-tags", "mixed-caption", "analyze", "mixed-caption-plus", "count"]
    assert list(bundle.read(output).tasks) == slugs
    assert json.loads((output / "tasks.json").read_text(encoding="utf-8"))["tasks"][-1] == MINE
    described = json.loads((output / bundle.DESCRIPTION).read_text(encoding="utf-8"))
    assert "tasks.json" not in described["files"], "it may be changed by hand"
    model, image = Florence2.from_pretrained(output, device="cpu"), np.zeros((40, 40, 3), np.uint8)
    assert isinstance(model.run("generate-tags", image).results, str)
    assert model.run("<COUNT>", image, text_input="cars").task.slug == "count"


def test_the_command_line_names_an_unknown_precision(source: Path, tmp_path: Path) -> None:
    done = run_export(source, tmp_path / "[out]", "--precision", "int3")
    assert done.returncode == 1 and "choose one of fp32, fp16" in done.stderr
    done = run_export(source / "[nothing]", tmp_path / "out")
    assert done.returncode == 1 and "[nothing]" in done.stderr, "square brackets are no markup"


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    done = run_export(tmp_path, tmp_path / "out")
    assert done.returncode == 1
    assert "config.json" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def graph_files(exported: Exported) -> list[Path]:
    return [exported.bundle / name for name in bundle.GRAPHS]


def test_graphs_have_no_control_flow_and_no_weight_twice(odd: Exported) -> None:
    places: dict[tuple[int, int], str] = {}
    contents: dict[bytes, tuple[int, int]] = {}
    weights = (odd.bundle / bundle.WEIGHTS).read_bytes()
    for path in graph_files(odd):
        model = onnx.load(str(path), load_external_data=False)
        assert not {"If", "Loop", "Scan"} & {node.op_type for node in model.graph.node}
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert tensor.ByteSize() < 2048, f"{tensor.name} lies inside {path.name}"
                continue
            entry = {item.key: item.value for item in tensor.external_data}
            place = (int(entry["offset"]), int(entry["length"]))
            assert entry["location"] == bundle.WEIGHTS
            places[place] = tensor.name
            contents.setdefault(weights[place[0] : sum(place)], place)
    assert len(places) == len(contents), "two places hold the same bytes"
    num_weights = sum(parameter.numel() for parameter in odd.checkpoint.model.parameters())
    assert sum(length for _, length in places) < 4.05 * num_weights


def test_nothing_of_this_machine_is_in_a_bundle(tiny: Exported) -> None:
    here = str(REPOSITORY).encode(), str(tiny.bundle).encode(), b"site-packages"
    for path in tiny.bundle.iterdir():
        content = path.read_bytes()
        assert not any(place in content for place in here), path.name


def test_a_wrong_graph_is_refused_and_nothing_is_left(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(path: Path) -> None:
        model = onnx.load(str(path))
        for tensor in model.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2:
                values = onnx.numpy_helper.to_array(tensor) * np.float32(1.5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, str(path))

    monkeypatch.setitem(PRECISIONS, "fp16", Recipe(damage, damage, damage))
    with pytest.raises(VerificationError, match=r"vision_encoder.onnx does not reproduce the checkpoint in fp16"):
        writer.export_bundle(tiny.checkpoint, tmp_path / "out", precision="fp16")
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_answers_nan_is_refused(tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The NaN is in one output, and not in the first; comparisons with it are false, and must not pass."""

    def poison(path: Path) -> None:
        model = onnx.load(str(path))
        if path.name == bundle.TEXT_ENCODER:
            name = model.graph.output[-1].name
            for node in model.graph.node:
                node.output[:] = [f"{name}_sound" if output == name else output for output in node.output]
            nan = onnx.numpy_helper.from_array(np.float32("nan"), "nan")
            model.graph.initializer.append(nan)
            model.graph.node.append(onnx.helper.make_node("Add", [f"{name}_sound", "nan"], [name]))
        onnx.save(model, str(path))

    monkeypatch.setitem(PRECISIONS, "fp16", Recipe(poison, poison, poison))
    with pytest.raises(
        VerificationError, match=r"text_encoder\.onnx does not reproduce .* cross_key_values\.1\.value is off by inf"
    ):
        writer.export_bundle(tiny.checkpoint, tmp_path / "out", precision="fp16")


def test_other_tokens_are_refused(tiny: Exported) -> None:
    written = bundle.read(tiny.bundle)
    options = replace(written.generation.options, no_repeat_ngram_size=0)  # the checkpoint says 3
    written = replace(written, generation=replace(written.generation, options=options))
    with pytest.raises(VerificationError, match=r"decoding .* gives other tokens than transformers: \d+ of \d+ agree"):
        checks.check_tokens(tiny.checkpoint, written)


def test_a_failure_at_any_step_leaves_an_existing_bundle_alone(
    tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / bundle.DESCRIPTION).write_text("kept")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "gather_weights", full_disk)
    with pytest.raises(OSError, match="No space left"):
        writer.export_bundle(tiny.checkpoint, output, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", bundle.DESCRIPTION]
    with pytest.raises(CheckpointError, match="exists"):
        writer.export_bundle(tiny.checkpoint, output)


@pytest.mark.parametrize("content", ["thesis.txt", "model.safetensors"])
def test_force_replaces_exports_only(tiny: Exported, tmp_path: Path, content: str) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / content).touch()
    (output / bundle.DESCRIPTION if content == "model.safetensors" else output / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not an exported model"):
        writer.export_bundle(tiny.checkpoint, output, force=True)
    assert (output / content).exists()


def test_the_old_export_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / bundle.DESCRIPTION).write_text("old")
    rename = Path.rename

    def fail_for_new(source: Path, target: Path) -> Path:
        if "incomplete" in source.name:
            raise OSError("no permission")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="no permission"), directories.new_directory(output, force=True) as directory:
        (directory / bundle.DESCRIPTION).write_text("new")
    assert (output / bundle.DESCRIPTION).read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bad_image_is_refused_before_the_work(tiny: Exported, tmp_path: Path) -> None:
    steps: list[str] = []
    with pytest.raises(ImageNotFoundError):
        writer.export_bundle(tiny.checkpoint, tmp_path / "out", images=["/nope.jpg"], progress=steps.append)
    assert steps == []


def test_a_killed_export_leaves_no_bundle_that_loads(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "export", str(source), str(output)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob(".out.incomplete-*/text_encoder.onnx")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not output.exists()
    (left,) = tmp_path.glob(".out.incomplete-*")
    with pytest.raises(BundleNotFoundError):
        Florence2.from_pretrained(left)


def test_every_graph_takes_every_size_it_promises(odd: Exported) -> None:
    for plan in plans(odd.checkpoint):
        errors = checks.compare_graph(plan, odd.bundle / plan.name)
        assert checks.check_graph(plan.name, errors, "fp32")["max_rel"] < 1e-4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("promptgen", "neither a JSON file of tasks nor a preset; the presets are: promptgen-v1"),
        (json.dumps({"tasks": [{**MINE, "parser": "json"}]}), "tasks[0]: parser must be one of pure_text"),
        (json.dumps({"tasks": [{**MINE, "slug": "ocr"}]}), "slug 'ocr' is that of Florence-2's own task"),
    ],
)
def test_wrong_tasks_are_refused_before_the_work(given: str, said: str, source: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(given, encoding="utf-8")
    done = run_export(source, tmp_path / "out", "--task", file if given.startswith("{") else given)
    assert done.returncode == 1 and said in done.stderr
    assert not (tmp_path / "out").exists()
