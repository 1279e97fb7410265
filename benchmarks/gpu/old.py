"""Everything to be known of a card, in one run: `python -m benchmarks.gpu BUNDLE… --device cuda --out $OUT`.

First what must be right: the built-in demo model answers every task on its sample pictures on the device and on the CPU, and the
answers are compared token by token. Then what is fast: each bundle's stages, greedy and with beams, alone
and in batches, with forced numbers of tokens, and the memory that the driver reports. Results are written after every step, so that
a run that is cut off loses nothing. The bundles have random or real weights; the times do not depend on them.

It needs onnxruntime-gpu and nothing that a machine without a network would lack; `--device cpu` tries the script itself.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime

from benchmarks import machine
from benchmarks.models import ROOT
from florence_onnx import Florence2, GenerationOptions, Region, tasks
from florence_onnx.errors import FlorenceError

SAMPLES = ROOT / "florence_onnx" / "demo" / "samples"
PICTURE = ROOT / "export" / "photograph.jpg"
GIVEN: dict[str, dict[str, Any]] = {
    "nothing": {},
    "text": {"text_input": "red circle"},
    "region": {"region": Region(217, 475, 377, 648)},
}
"""What a question has besides its picture, by what its task needs."""
NUM_TOKENS = 64
MAX_NEW_TOKENS = 100


class Report:
    """Kept on disk at every moment."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Notes a step, and shows it."""
        self.found[name] = value
        self._path.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(value)}", flush=True)


def describe_card() -> dict[str, str]:
    """What nvidia-smi says; empty where there is none."""
    fields = ("name", "driver_version", "memory.total", "memory.used", "clocks.max.sm", "power.limit")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(zip(fields, (value.strip() for value in done.stdout.split("\n")[0].split(",")), strict=False))


def seconds(call: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and minimum of some calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return {"median_s": statistics.median(taken), "min_s": min(taken)}


def compare_answers(device: str) -> dict[str, Any]:
    """The demo model on the device against itself on the CPU.

    Returns:
        `questions`; `same_tokens`, the share of equal answers; `different`, at most ten that are not.
    """
    models = [Florence2.from_pretrained("demo", device=name) for name in (device, "cpu")]
    options = GenerationOptions(max_new_tokens=MAX_NEW_TOKENS)
    different = []
    questions = 0
    for picture in sorted(SAMPLES.glob("*.png")):
        for task in tasks.TASKS.values():
            own, reference = (model.run(task, picture, options=options, **GIVEN[task.needs]) for model in models)
            questions += 1
            if own.token_ids != reference.token_ids:
                different.append([picture.name, task.slug, own.text, reference.text])
    return {
        "questions": questions,
        "same_tokens": 1 - len(different) / questions,
        "different": different[:10],
        "provider": models[0].info()["provider"],
    }


def measure(path: str, device: str, batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """A bundle's stages."""
    begin = time.perf_counter()
    model = Florence2.from_pretrained(path, device=device)
    found: dict[str, Any] = {"load_s": time.perf_counter() - begin, "info": _brief(model)}
    found["encode"] = seconds(lambda: model.encode(PICTURE), repeats)
    encoded = model.encode(PICTURE)
    for beams in (1, 3):
        # the difference of two lengths is what the tokens between them took, without the prompt's part
        short, long = (GenerationOptions(beams, count, min_new_tokens=count - 1) for count in (2, NUM_TOKENS))
        for batch in batches:
            times = [
                seconds(partial(model.run_batch, "<OD>", [encoded] * batch, options=options), repeats)
                for options in (short, long)
            ]
            found[f"beams {beams}, batch {batch}"] = {
                "prompt_and_two_tokens": times[0],
                "answer": times[1],
                "ms_per_token": (times[1]["min_s"] - times[0]["min_s"]) / (NUM_TOKENS - 2) * 1000,
                "answers_per_s": batch / times[1]["min_s"],
            }
    found["card"] = describe_card()
    return found


def _brief(model: Florence2) -> dict[str, Any]:
    info = model.info()
    return {name: info[name] for name in ("precision", "vision_precision", "provider")}


def main() -> None:
    """Exit code 1: a step failed, or an answer differs by more than `--max-different` of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", default=["demo"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--max-different", type=float, default=0.05, help="fp16 rounds otherwise on another device")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    report = Report(arguments.out / f"gpu-{arguments.device}.json")
    report.add("machine", machine.describe())
    report.add("card", describe_card())
    report.add("onnxruntime", [onnxruntime.__version__, onnxruntime.get_available_providers()])
    failed = False
    steps: dict[str, Callable[[], dict[str, Any]]] = {"answers": partial(compare_answers, arguments.device)}
    for bundle in arguments.bundles:
        steps[f"bundle {Path(bundle).name}"] = partial(
            measure, bundle, arguments.device, arguments.batches, arguments.repeats
        )
    for name, step in steps.items():
        try:
            report.add(name, step())
        except (FlorenceError, RuntimeError) as error:  # the other steps are worth their time on the card
            failed = True
            report.add(name, {"error": f"{type(error).__name__}: {error}"})
    different = 1 - report.found["answers"].get("same_tokens", 0)
    sys.exit(1 if failed or different > arguments.max_different else 0)


if __name__ == "__main__":
    main()
