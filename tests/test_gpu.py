"""The script that measures a card: its half that needs none, here; all of it where there is a card."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'florence-onnx[cpu]'")

ROOT = Path(__file__).resolve().parents[1]
HAS_CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def run(device: str, out: Path) -> tuple[int, dict[str, Any]]:
    """The exit code and what was written."""
    command = [sys.executable, "-m", "benchmarks.gpu", "demo", "--device", device, "--batches", "1", "--repeats", "1"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.returncode, json.loads((out / f"gpu-{device}.json").read_text())


def test_the_script_on_the_cpu(tmp_path: Path) -> None:
    code, found = run("cpu", tmp_path)
    assert code == 0
    assert (found["answers"]["questions"], found["answers"]["same_tokens"]) == (120, 1)
    for beams in (1, 3):
        figures = found["bundle demo"][f"beams {beams}, batch 1"]
        assert figures["answer"]["min_s"] > figures["prompt_and_two_tokens"]["min_s"] > 0
        assert figures["answers_per_s"] > 0


@pytest.mark.skipif(HAS_CUDA, reason="the installed onnxruntime has CUDA")
def test_a_device_that_is_not_there_is_said_at_every_step(tmp_path: Path) -> None:
    code, found = run("cuda", tmp_path)
    assert code == 1
    for step in ("answers", "bundle demo"):
        assert "CUDAExecutionProvider is not in the installed onnxruntime" in found[step]["error"]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_CUDA, reason="needs an NVIDIA card and onnxruntime-gpu")
def test_the_script_on_the_card(tmp_path: Path) -> None:
    code, found = run("cuda", tmp_path)
    assert code == 0, found
    assert found["answers"]["provider"] == "CUDAExecutionProvider"
