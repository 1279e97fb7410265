"""The benchmark of the GPU path: every step on the CPU here, and all of it if there is a GPU."""

from __future__ import annotations

import filecmp
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import NO_TORCH, Exported

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'florence-onnx[cpu]'")
pytest.importorskip("onnx", reason="pip install -e '.[export]'")

from benchmarks.gpu import answers, bars, hardware, prepare, report, skeleton, timing  # noqa: E402
from benchmarks.gpu.__main__ import run_step  # noqa: E402
from benchmarks.gpu.figures import Figures  # noqa: E402
from benchmarks.gpu.sources import DEMO_CHECKPOINT, MODELS, MissingError, Sources  # noqa: E402
from benchmarks.gpu.steps import RUNNERS, Settings, Step, plan  # noqa: E402
from florence_onnx import Florence2, GenerationOptions  # noqa: E402
from florence_onnx.bundles.bundle import DEMO_DIRECTORY  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
IMAGE = answers.SAMPLES / "scene-1.png"


def run(out: Path, *more: str, device: str = "cpu") -> tuple[int, dict[str, Any]]:
    """The exit code of the command, and the JSON that it wrote."""
    command = [sys.executable, "-m", "benchmarks.gpu", "demo", "--device", device, "--quick", "--out", str(out)]
    more = (*more, "--work", str(out / "work"), "--carried", str(out / "carried"))
    done = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True, timeout=600)
    return done.returncode, json.loads((out / f"gpu-{device}.json").read_text())


# --------------------------------------------------------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("gpu")
    (folder / "carried").mkdir()
    return Settings("cpu", str(folder / "carried"), str(folder / "work"), is_quick=True)


def run_here(step: Step, settings: Settings, folder: Path) -> Figures:
    """A step in this process, which has imported torch already."""
    figures = Figures(folder / "figures.json")
    RUNNERS[step.kind](step, settings, figures)
    # other processes may make the difference between two lengths negative
    assert [said for said in figures.errors.values() if "took no longer than" not in said] == []
    assert json.loads((folder / "figures.json").read_text())["figures"] == json.loads(json.dumps(figures.found))
    return figures


@pytest.mark.parametrize("step", [each for each in plan("cpu", ["demo"]) if each.kind != "plain"], ids=lambda s: s.name)
def test_every_step_on_the_cpu(step: Step, settings: Settings, tmp_path: Path) -> None:
    if step.kind in ("transformers", "answers", "rates"):
        pytest.importorskip("transformers", reason=NO_TORCH)
    found = run_here(step, settings, tmp_path).found
    if step.kind in ("ours", "transformers"):
        assert found["caption_b1"]["ms"] > 0
        assert found["greedy128_b1"]["ms"] > 0
        assert found["throughput_captions"]["per_s"] > 0
    if step.kind == "graphs":
        assert {"vision_encoder cpu batch 1", "text_encoder cpu prompts 1"} <= set(found)
        assert any(name.startswith("decoder") and name.endswith("rows 3") for name in found)
    if step.kind == "check":
        assert found["ours"]["same_tokens"] == 1
        assert found["ours"]["logits"]["relative"] < 1e-3
    if step.kind == "answers":
        compared = found["ours fp16 resident against ours on the cpu"]
        assert [compared[search]["answers"] for search in answers.SEARCHES] == [1, 1]
        assert found["ours fp16 resident against transformers fp32"]["greedy"]["tokens"] > 0.9
        assert found["transformers fp32 against ours on the cpu"]["logits"]["relative"] < 0.01


def test_plain_graphs_of_a_skeleton(
    export_of: Callable[[str, str], Exported], settings: Settings, tmp_path: Path
) -> None:
    """A tiny model under the name of the skeleton that the step reads."""
    plain = export_of("tiny", "transformers-js-fp16").bundle
    packed = skeleton.pack(plain, tmp_path / "demo-plain.tar", plain.parent / "checkpoint")
    prepare.write_archive([packed], Path(settings.carried) / MODELS)
    found = run_here(Step("plain:demo", "plain", "demo"), settings, tmp_path).found
    assert found["info"]["layout"] == "transformers.js"
    assert found["info"]["precision"] == "fp16"
    assert found["caption_b2"]["ms"] > 0


def test_what_was_not_carried_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"large-fp16\.tar was not carried: python -m benchmarks\.gpu\.prepare"):
        Sources(tmp_path, tmp_path).bundle("large", "fp16")


# ---------------------------------------------------------------------------------------------------------- the command


def test_a_run_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    code, first = run(tmp_path, "--steps", "hardware,floors")
    assert code == 0
    assert {name: step["status"] for name, step in first["steps"].items()} == {
        "hardware": "done",
        "floors:demo": "done",
    }
    code, second = run(tmp_path, "--steps", "hardware,floors,start,plain")
    assert code == 0
    assert second["steps"]["hardware"] == first["steps"]["hardware"]
    assert second["steps"]["start"]["figures"]["provider"] == "CPUExecutionProvider"
    assert second["steps"]["plain:demo"]["status"] == "skipped"
    assert "was not carried" in second["steps"]["plain:demo"]["reason"]
    assert str(tmp_path) not in second["command"]
    _, third = run(tmp_path, "--steps", "hardware", "--again")
    assert third["steps"]["hardware"]["seconds"] != first["steps"]["hardware"]["seconds"]
    assert "| vision, wall |" not in (tmp_path / "gpu-cpu.md").read_text()  # nothing of ours was timed


def test_no_step_is_started_without_time_for_it(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--steps", "hardware", "--budget-s", "1")
    assert (code, found["steps"]) == (1, {})


@pytest.mark.skipif(HAS_CUDA, reason="the installed onnxruntime has CUDA")
def test_a_device_that_is_not_there_is_said_and_the_others_go_on(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--steps", "start,floors,ours:demo:tensorrt", device="cuda")
    assert code == 1
    assert found["steps"]["start"]["status"] == "failed"
    assert "CUDAExecutionProvider is not in the installed onnxruntime" in found["steps"]["start"]["reason"]
    assert found["steps"]["floors:demo"]["status"] == "done"
    if not hardware.find_tensorrt():
        assert found["steps"]["ours:demo:tensorrt"]["status"] == "skipped"
    assert "CUDAExecutionProvider is not in" in (tmp_path / "gpu-cuda.md").read_text()


def test_a_step_that_takes_too_long_is_ended(settings: Settings, tmp_path: Path) -> None:
    outcome = run_step(Step("hardware", "hardware"), settings, 0.05, tmp_path)
    assert (outcome["status"], outcome["reason"]) == ("timeout", "after 0 s")


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs an NVIDIA GPU and onnxruntime-gpu")
def test_the_script_on_the_gpu(tmp_path: Path) -> None:
    code, found = run(tmp_path, "--without", "transformers,plain", device="cuda")
    assert code == 0, found
    assert found["steps"]["ours:demo:cuda-graphs"]["figures"]["info"]["provider"] == "CUDAExecutionProvider"


# ------------------------------------------------------------------------------------------------------------ skeletons


def test_an_exact_skeleton_gives_the_same_bundle(tmp_path: Path) -> None:
    packed = skeleton.pack(DEMO_DIRECTORY, tmp_path / "demo.tar.xz", DEMO_CHECKPOINT, exact=True)
    weights = DEMO_DIRECTORY / "weights.data"
    assert packed.stat().st_size < weights.stat().st_size / 3
    filled = skeleton.fill(packed, tmp_path / "filled", checkpoint=DEMO_CHECKPOINT)
    assert filecmp.cmp(filled / "weights.data", weights, shallow=False)
    for path in DEMO_DIRECTORY.glob("*.onnx"):
        assert filecmp.cmp(filled / path.name, path, shallow=False)
    assert json.loads((filled / "florence_onnx.json").read_text()) == json.loads(
        (DEMO_DIRECTORY / "florence_onnx.json").read_text()
    )


def test_random_weights_keep_their_statistics_and_give_finite_numbers(tmp_path: Path) -> None:
    packed = skeleton.pack(DEMO_DIRECTORY, tmp_path / "demo.tar.xz", DEMO_CHECKPOINT)
    assert packed.stat().st_size < 200_000
    one, same, other = (skeleton.fill(packed, tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert filecmp.cmp(one / "weights.data", same / "weights.data", shallow=False)
    assert not filecmp.cmp(one / "weights.data", other / "weights.data", shallow=False)
    listed = json.loads((one / "skeleton.json").read_text())["tensors"]
    largest = max((entry for entry in listed if "std" in entry), key=lambda entry: entry["length"])
    data = np.fromfile(one / "weights.data", largest["dtype"], math.prod(largest["shape"]), offset=largest["offset"])
    assert data.mean(dtype=np.float64) == pytest.approx(largest["mean"][0], abs=0.05 * largest["std"][0])
    assert data.std(dtype=np.float64) == pytest.approx(largest["std"][0], rel=0.05)
    kernel = next(entry for entry in listed if entry.get("shape", [])[1:] == [1, 3, 3])
    assert np.argmax(kernel["mean"]) == 4  # the residual connection in the middle
    model = Florence2.from_pretrained(one, device="cpu")
    assert "random numbers" in model.info()["source"]["name"]
    ids = model.run("<OD>", IMAGE, options=GenerationOptions(num_beams=1, max_new_tokens=4)).token_ids
    assert np.isfinite(model.score_tokens("<OD>", IMAGE, ids)).all()


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    from onnx import helper, numpy_helper, save

    values = np.random.default_rng(0).integers(0, 255, 2 * skeleton.MAX_CONSTANT_BYTES).astype(np.uint8)
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(values, "w")])
    (tmp_path / "bundle").mkdir()
    save(helper.make_model(graph), tmp_path / "bundle" / "decoder.onnx")
    with pytest.raises(ValueError, match="would have to be kept"):
        skeleton.pack(tmp_path / "bundle", tmp_path / "out.tar.xz", DEMO_CHECKPOINT)


def test_the_command_for_the_device_machine_fits_and_starts_the_script() -> None:
    line = prepare.command(".gpu", "large base")
    assert len(line) <= prepare.MAX_COMMAND
    assert "python3 -m benchmarks.gpu large base --device cuda --out $OUT --carried .gpu" in line
    subprocess.run(["bash", "-n", "-c", line], check=True)


# --------------------------------------------------------------------------------------------------- times and judgement


def kernel(start: float, duration: float, name: str = "gemm", category: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": duration}


def test_device_time_counts_overlapping_work_once() -> None:
    events = [
        kernel(0, 1000),
        kernel(500, 1000, "softmax"),  # on another stream
        kernel(4000, 500, "copy", "gpu_memcpy"),
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 9999},
        {"ph": "i", "cat": "kernel", "name": "mark", "ts": 0},
    ]
    found = timing.summarize(events, runs=2)
    assert found["device_ms"] == pytest.approx(1.0)
    assert found["copies_ms"] == pytest.approx(0.25)
    assert found["kernels"] == 1
    assert found["top"] == [["gemm", 0.5], ["softmax", 0.5], ["copy", 0.25]]


def test_floors_follow_from_rates() -> None:
    needed = {
        "vision_gflop": 2000.0,
        "text_encoder_gflop": 100.0,
        "step_mb": {"step_greedy": 300.0, "step_beams": 600.0},
    }
    found = hardware.floor_ms(needed, {"float16": 500e12, "copy": 3e12})
    assert found == {"vision": 4.0, "text_encoder": 0.2, "step_greedy": 0.1, "step_beams": 0.2}


def own(**figures: float) -> dict[str, Any]:
    return {"status": "done", "figures": {name: {"ms": value} for name, value in figures.items()}}


def test_bars_take_the_fastest_variant_and_tell_missing_from_missed() -> None:
    steps = {
        "ours:large:cuda": own(caption_b1=50.0, vision_b1=1.0),
        "ours:large:cuda-graphs": own(caption_b1=20.0, vision_b1=7.0),
        "transformers:large:fp16": own(caption_b1=300.0, greedy128_b1=2000.0),
    }
    found = {judged.bar.text: judged for judged in bars.judge(steps, "large")}
    assert found["caption, 16 tokens, 3 beams, wall"].status == "met"
    assert found["vision, wall"].status == "missed"
    assert found["vision, wall"].variant == "cuda-graphs"
    assert found["128 greedy tokens, wall"].status == "not measured"
    assert found["caption, times as fast as transformers fp16"].value == pytest.approx(15)
    assert {judged.status for judged in bars.judge({}, "large")} == {"not measured"}


def test_answers_in_fp32_must_be_equal_or_their_logits_near() -> None:
    def compared(share: float, error: float) -> dict[str, Any]:
        return {"greedy": {"answers": share}, "beams": {"answers": share}, "logits": {"relative": error}}

    figures = {
        "ours fp32 against transformers fp32": compared(0.9, 1e-2),
        "ours fp32 no graphs against transformers fp32": compared(0.9, 1e-5),
        "ours fp16 against transformers fp32": compared(0.9, 1e-2),
    }
    said = dict(bars.judge_answers({"answers": {"figures": figures}}))
    assert [text.rpartition("; ")[2] for text in said.values()] == ["MISSED", "met", "logits 1.0e-02"]


def test_logits_at_full_size_must_be_near_and_numbers() -> None:
    def checked(error: float, *, is_finite: bool) -> dict[str, Any]:
        own = {"same_tokens": 1.0, "logits": {"relative": error}}
        return {"check:base": {"figures": {"reference": {"is_finite": is_finite}, "ours": own}}}

    found = [checked(0.001, is_finite=True), checked(0.001, is_finite=False), checked(0.2, is_finite=True)]
    said = [bars.judge_checks(steps)[0][1].rpartition("; ")[2] for steps in found]
    assert said == ["met", "MISSED", "MISSED"]


def test_logits_that_are_no_numbers_are_near_nothing() -> None:
    expected = np.ones((2, 3), dtype=np.float32)
    assert answers.logits_error(expected, expected) == {"relative": 0, "greatest": 0, "same_best": 1}
    assert answers.logits_error(expected * np.nan, expected)["relative"] > 1


def test_shares_count_answers_and_places() -> None:
    found = answers.share_equal([(2, 0, 5), (2, 0, 6, 2)], [(2, 0, 5), (2, 0, 7)])
    assert (found["answers"], found["tokens"], found["different"]) == (0.5, 5 / 7, [1])


def test_the_report_shows_what_failed(tmp_path: Path) -> None:
    steps = {"ours:large:cuda": {**own(caption_b1=25.0), "seconds": 1.0, "errors": {"vision_b1": "RuntimeError: no"}}}
    text = report.markdown({"device": "cuda", "created": "2026-01-01", "command": "x", "steps": steps})
    assert "| caption, 16 tokens, 3 beams, wall | at most 30 ms | 25 ms | cuda | met |" in text
    assert "vision_b1: RuntimeError: no" in text
