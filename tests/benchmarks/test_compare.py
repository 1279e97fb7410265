"""The comparison with other runtimes: its figures, interruptions, and chart. No time is asserted."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import NO_TORCH, Exported

pytest.importorskip("typer", reason="needs typer: pip install -e '.[bench]'")
pytest.importorskip("rich", reason="needs rich: pip install -e '.[bench]'")
pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[bench]'")

from benchmarks import models
from benchmarks.costs import Costs
from benchmarks.cpu import bars, report, results
from benchmarks.cpu.jobs import DERIVED, STAGES, Job, Peer, Prompt, Workload
from benchmarks.cpu.launcher import FailedError, Launcher

ROOT = Path(__file__).resolve().parents[2]
NODE = ROOT / "benchmarks" / ".node"
NUM_TOKENS = 6


def compare(tiny: Exported, work: Path, out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The result of a run on the tiny model, and its messages."""
    checkpoint = tiny.bundle.parent / "checkpoint"
    command = ["benchmarks.cpu.compare", "--checkpoint", str(checkpoint), "--work", str(work), "--out", str(out)]
    command += ["--threads", "1", "--ours", f"fp32={tiny.bundle}"]
    command += ["--tokens", str(NUM_TOKENS), "--rounds", "1", "--repeats", "1", *arguments]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found, done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def measured(tiny: Exported, work: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, Path]:
    """The reference, the plain export and this runtime, and a peer that cannot run."""
    out = tmp_path_factory.mktemp("out")
    names = "transformers-fp32,plain-onnx,ours-fp32,transformers.js"
    return *compare(tiny, work, out, "--peers", names, "--node", str(out / "absent")), out


def test_every_peer_gives_the_same_tokens(measured: tuple[dict[str, Any], str, Path]) -> None:
    result = measured[0]
    assert list(result["peers"]) == ["transformers-fp32", "plain-onnx", "ours-fp32"]
    assert result["checks"] == []
    for peer in result["peers"].values():
        assert peer["agreement"] == {"greedy": 1.0, "beams": 1.0}
        assert {len(ids) for ids in peer["tokens"].values()} == {NUM_TOKENS}


def test_every_stage_is_measured(measured: tuple[dict[str, Any], str, Path]) -> None:
    for peer in measured[0]["peers"].values():
        assert set(peer["stages"]) == {*STAGES, *DERIVED}
        assert all(sample > 0 for stage in STAGES for sample in peer["stages"][stage]["samples"])
        assert peer["peak_rss"]["min"] > 20e6
        assert peer["cold_start"]["min"] > peer["load"]["min"] > 0


def test_the_floor_is_measured_and_computed(measured: tuple[dict[str, Any], str, Path]) -> None:
    floor = measured[0]["floor"]
    assert min(floor["rates"][name] for name in ("fp32", "int8", "read", "bf16")) > 0
    assert floor["stages"]["fp32"]["step_greedy"] > floor["stages"]["int8"]["step_greedy"] > 0


def test_who_is_missing_is_listed_with_the_reason(measured: tuple[dict[str, Any], str, Path]) -> None:
    absent = measured[0]["absent"]
    assert "npm install" in absent["transformers.js"] or "Node is not installed" in absent["transformers.js"]


def test_tables_are_printed_and_files_written(measured: tuple[dict[str, Any], str, Path]) -> None:
    result, printed, out = measured
    markdown, data = sorted(out.glob("*.md")), sorted(out.glob("*.json"))
    assert len(markdown) == len(data) == 1
    assert json.loads(data[0].read_text())["peers"].keys() == result["peers"].keys()
    for text in (printed, markdown[0].read_text()):
        assert "plain-onnx" in text and "Times the floor" in text and "npm install" in text
    assert len(result["bars"]) == len(bars.BARS) + 1
    assert str(ROOT) not in data[0].read_text()


@pytest.mark.skipif(shutil.which("node") is None, reason="Node is not installed")
@pytest.mark.skipif(not (NODE / "node_modules").is_dir(), reason="transformers.js is not in benchmarks/.node")
def test_transformers_js_gives_the_same_tokens(
    tiny: Exported, work: Path, measured: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    result, _ = compare(tiny, work, tmp_path, "--peers", "transformers.js")
    peer = result["peers"]["transformers.js"]
    assert peer["tokens"]["greedy"] == measured[0]["peers"]["transformers-fp32"]["tokens"]["greedy"]
    assert all(sample > 0 for stage in peer["stages"].values() for sample in stage.get("samples", []))


def test_openvino_gives_the_same_tokens(
    tiny: Exported, work: Path, measured: tuple[dict[str, Any], str, Path], tmp_path: Path
) -> None:
    pytest.importorskip("openvino", reason="needs openvino: pip install -e '.[bench]'")
    result, _ = compare(tiny, work, tmp_path, "--peers", "openvino-fp32")
    assert result["peers"]["openvino-fp32"]["tokens"] == measured[0]["peers"]["transformers-fp32"]["tokens"]


# ------------------------------------------------------------------------------------------------------- made-up results


def peer(precision: str, vision: float, step: float, **more: Any) -> dict[str, Any]:
    """A peer whose figures are computed from two times in seconds."""
    stages = {
        "preprocess": 0.02,
        "vision": vision,
        "first_tokens_greedy": vision / 8,
        "first_tokens_beams": vision / 6,
        "answer_greedy": vision / 8 + 62 * step,
        "answer_beams": vision / 6 + 62 * 1.5 * step,
        "second_task": vision / 8 + 62 * step,
        "step_greedy": step,
        "step_beams": 1.5 * step,
        "end_to_end_greedy": 0.02 + vision * 9 / 8 + 62 * step,
        "end_to_end_beams": 0.02 + vision * 7 / 6 + 62 * 1.5 * step,
    }
    figures = {name: {"min": 0.9 * x, "median": x} for name, x in stages.items()}
    sizes = {"cold_start": {"min": 2.0, "median": 3.0}, "peak_rss": {"min": 1e9, "median": 1e9}}
    return {
        "title": more.pop("title", precision),
        "precision": precision,
        "stages": figures,
        "notes": [],
        **sizes,
        **more,
    }


def made_up() -> dict[str, Any]:
    """A result like those of `compare`, with the fields that bars and charts read."""
    same = {"agreement": {"greedy": 1.0, "beams": 1.0}}
    rivals = {
        "transformers-fp32": peer("fp32", 3.0, 0.036, title="transformers, fp32", **same),
        "plain-onnx": peer("fp32", 2.3, 0.0136, title="plain ONNX (four graphs), ONNX Runtime, fp32", **same),
        "openvino-bf16": peer("fp32", 2.2, 0.0157, title="OpenVINO on our graphs, bf16 hint"),
        "ours-fp32": peer("fp32", 2.0, 0.012, title="ours, fp32", **same),
        "ours-int8": peer("int8", 0.8, 0.004, title="ours, int8"),
    }
    workload = {"num_tokens": 64, "num_beams": 3, "threads": 2, "repeats": 2, "first": {"task": "<OD>"}}
    machine = {"cpu": "A CPU", "family": "", "flags": ["avx2"], "cores": 2, "memory_bytes": 8e9, "system": "Linux"}
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "command": "python -m benchmarks.cpu.compare",
        "model": {
            "name": "Florence-2-base",
            "weights": "random weights",
            "image_size": [768, 768],
            "prompt_tokens": 12,
        },
        "workload": workload,
        "machine": {**machine, "load_before": 0.0},
        "rounds": 3,
        "versions": {},
        "checks": [],
        "peers": rivals,
        "absent": {"transformers-bf16": "skipped: no bf16 arithmetic [measured]"},
        "floor": {"stages": {"fp32": dict.fromkeys((*STAGES, *DERIVED), 0.011)}},
    }


def test_bars_hit_miss_and_cannot_be_measured() -> None:
    rows = bars.evaluate(made_up(), "ours-int8")
    found = {(row["text"], row["rival"]): row for row in rows}
    assert found["fp32 tokens equal", "transformers-fp32"]["status"] == "hit"
    vision = found["fp32 vision encoder", "transformers-fp32"]
    assert (vision["status"], vision["ratio"]) == ("hit", pytest.approx(1.5))
    assert vision["ratio_at_floor"] == pytest.approx(3.0 / 0.011)
    against_memory = found["fp32 greedy token against memory", "floor"]
    assert (against_memory["status"], against_memory["ratio"]) == ("hit", pytest.approx(12 / 11))
    assert against_memory["ratio_at_floor"] == 1
    assert found["peak memory", "transformers-bf16"].get("ratio_at_floor") is None
    assert found["fp32 end to end, beams", "transformers-fp32"]["status"] == "miss"
    assert found["second task against the first", "ours-int8"]["status"] == "miss"
    skipped = found["default greedy token", "transformers-bf16"]
    assert (skipped["status"], skipped["reason"]) == (
        "not measured",
        "transformers-bf16: skipped: no bf16 arithmetic [measured]",
    )


def test_other_tokens_are_a_miss() -> None:
    result = made_up()
    result["peers"]["ours-fp32"]["agreement"] = {"greedy": 1.0, "beams": 0.5}
    assert bars.evaluate(result, None)[0]["status"] == "miss"


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_chart_is_drawn(tmp_path: Path, suffix: str) -> None:
    source, output = tmp_path / "result.json", tmp_path / f"chart.{suffix}"
    source.write_text(json.dumps(made_up()))
    command = [sys.executable, "-m", "benchmarks.cpu.chart", str(source), str(output)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert output.stat().st_size > 5_000


def test_a_report_of_a_made_up_result() -> None:
    result = made_up()
    result |= {"default": "ours-int8", "default_reason": "asked for", "bars": bars.evaluate(result, "ours-int8")}
    text = report.markdown(result)
    assert "| ours-int8" in text and "skipped: no bf16 arithmetic [measured]" in text


def test_unequal_tokens_and_lengths_are_reported() -> None:
    tokens = {"greedy": [0, 5, 2], "beams": [0, 6, 2]}
    peers = {
        "transformers-fp32": {"tokens": tokens, "is_exact": True},
        "plain-onnx": {"tokens": {**tokens, "beams": [0, 7, 2]}, "is_exact": True},
        "ours-int8": {"tokens": {"greedy": [0, 2], "beams": [0, 6, 2]}, "is_exact": False},
    }
    other, length = results.compare_tokens(peers, 3)
    assert "plain-onnx gives other tokens" in other and "beams 67%" in other
    assert "ours-int8 gave" in length


# ------------------------------------------------------------------------------------------------------------- the parts


def test_an_export_that_fails_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_run", lambda *command: models._refuse("", "loading\nerror: unknown precision\n", 1))
    made = models.Models("tiny", tmp_path)
    with pytest.raises(models.PreparationError, match=r"^error: unknown precision$"):
        made.path("bundle:int8")


def test_checkpoints_of_every_size_are_written_on_demand(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason=NO_TORCH)
    from benchmarks.checkpoints import write

    path = write("tiny", tmp_path / "work" / "tiny")
    assert Costs.read(path).image_size == (128, 128)
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny"]


def test_jobs_travel_as_json() -> None:
    prompts = (Prompt("<OD>", "Locate"), Prompt("<CAPTION>", "What"))
    workload = Workload("a.jpg", "b.png", *prompts, 64, 3, 1, 2, {"early_stopping": True})
    job = Job(Peer("p", "title", "ours", "bundle:fp32", "fp32"), "model", "checkpoint", workload, 1.5, 60.0)
    assert Job.load(job.dump()) == job


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os; os.kill(os.getpid(), 15)", "ended by signal 15"),
        ("print('hello')", "printed no result"),
        ("import time; time.sleep(60)", "gave up"),
    ],
)
def test_a_crash_is_a_reason_not_an_end(tmp_path: Path, code: str, message: str) -> None:
    launcher = Launcher(1, 1.0, tmp_path, tmp_path)
    with pytest.raises(FailedError, match=message):
        launcher.call([sys.executable, "-c", code])


def test_costs_of_the_base_model_from_its_config() -> None:
    pytest.importorskip("transformers", reason=NO_TORCH)
    from tests import checkpoints

    config = checkpoints.full_size_config("base").to_dict()
    costs = Costs(config["vision_config"], config["text_config"], (768, 768))
    assert costs.num_image_tokens == 577
    # 6 layers of 4 + 2 square matrices and two to and from 3072, and the head
    assert costs.decoder_parameters() == 6 * (6 * 768**2 + 2 * 768 * 3072) + 51328 * 768
    cross, own = 2 * 6 * 768 * (577 + 12) * 4, 2 * 6 * 768 * 3 * 32 * 4
    found = costs.step_bytes("fp32", prompt_tokens=12, past=32, num_beams=3)
    assert found == costs.decoder_parameters() * 4 + cross + own
    assert 350e9 < costs.vision_flops() < 400e9


def test_vision_operations_are_those_that_pytorch_counts(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason=NO_TORCH)
    pytest.importorskip("transformers", reason=NO_TORCH)
    from torch.utils.flop_counter import FlopCounterMode

    from tests import checkpoints

    config = checkpoints.tiny_config()
    model = checkpoints.build_model(config)
    model.set_attn_implementation("eager")  # the counter does not count the fused attention on a CPU
    costs = Costs(config.vision_config.to_dict(), config.text_config.to_dict(), (128, 128))
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.get_image_features(torch.zeros(1, 3, 128, 128))
    assert costs.vision_flops() == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_an_interrupted_run_keeps_what_it_has(tiny: Exported, work: Path, tmp_path: Path) -> None:
    checkpoint = tiny.bundle.parent / "checkpoint"
    command = [sys.executable, "-m", "benchmarks.cpu.compare", "--checkpoint", str(checkpoint), "--work", str(work)]
    command += ["--out", str(tmp_path), "--threads", "1", "--tokens", "6", "--rounds", "1000", "--peers", "ours-fp32"]
    command += ["--ours", f"fp32={tiny.bundle}"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("*.json")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "interrupted" in errors
    assert list(json.loads(output.splitlines()[-1])["peers"]) == ["ours-fp32"]
    assert all(path.stem.endswith("-incomplete") for path in tmp_path.iterdir())


def test_who_is_faster_than_the_machine_is_named() -> None:
    """For example, if one runtime gets smaller images than the others, ratios to it are meaningless."""
    result = made_up()
    floor = {"stages": {"fp32": {"vision": 1.9, "text_encoder": 0.01}}}
    stages = {name: {"stages": peer["stages"], "precision": "fp32"} for name, peer in result["peers"].items()}
    stages = {name: stages[name] for name in ("transformers-fp32", "ours-fp32")}
    assert results.find_implausible(stages, floor) == []
    stages["transformers-fp32"]["stages"]["vision"]["min"] = 0.4
    (found,) = results.find_implausible(stages, floor)
    assert found.startswith("transformers-fp32 took 0.21 of the floor for vision")


def test_a_preprocessor_that_crops_is_refused(tiny: Exported, tmp_path: Path) -> None:
    """transformers' CLIP processor crops to 224 x 224 where a checkpoint does not say otherwise."""
    from benchmarks.cpu.peers.protocol import UnavailableError

    checkpoint = shutil.copytree(tiny.bundle.parent / "checkpoint", tmp_path / "checkpoint")
    path = checkpoint / "preprocessor_config.json"
    content = json.loads(path.read_text())
    job = make_job(str(checkpoint))
    loaded_runner(job).preprocess(job.workload.image)  # as it is, it is accepted
    path.write_text(json.dumps({**content, "do_center_crop": True, "crop_size": {"height": 96, "width": 96}}))
    loaded = loaded_runner(job)
    with pytest.raises(
        UnavailableError, match=r"makes images of 96 x 96, the model takes 128 x 128: set do_center_crop"
    ):
        loaded.preprocess(job.workload.image)


def make_job(checkpoint: str) -> Job:
    prompt = Prompt("<OD>", "Locate the objects with category name in the image.")
    image = str(ROOT / "export" / "verification" / "photograph.jpg")
    workload = Workload(image, image, prompt, prompt, NUM_TOKENS, 2, 1, 1, {})
    peer = Peer("transformers-fp32", "transformers, fp32", "pytorch", "checkpoint", "fp32", {"dtype": "float32"})
    return Job(peer, checkpoint, checkpoint, workload, time.time(), 60.0)


def loaded_runner(job: Job) -> Any:
    from benchmarks.cpu.peers.pytorch import PyTorchRunner

    runner = PyTorchRunner(job)
    runner.load()
    return runner
