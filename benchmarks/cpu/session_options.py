"""The effect of each session option on time and memory: `python -m benchmarks.cpu.session_options BUNDLE > table.md`.

Every configuration runs in fresh processes. The configurations take turns for several rounds, so that a busy moment of
the machine does not affect only one. For each are printed the minimum wall and CPU time of every stage over all rounds,
and the largest peak memory. Wall time is what a user waits; CPU time depends less on other processes, and includes
threads that spin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "ONNX Runtime's own threads": {"intra_op_num_threads": 0},
    "one thread": {"intra_op_num_threads": 1},
    "no spinning": {"session.intra_op.allow_spinning": 0},
    "spinning goes on after a run": {"session.force_spinning_stop": 0},
    "no arena": {"enable_cpu_mem_arena": False},
    "memory pattern": {"enable_mem_pattern": True},
    "denormals are zero": {"session.set_denormal_as_zero": 1},
    "initializers outside the arena": {"session.use_device_allocator_for_initializers": 1},
    "no prepacking": {"session.disable_prepacking": 1},
}
"""Session options on top of the package's own, by their name in the table."""

_CHILD = """
import json, sys, time
job = json.load(sys.stdin)
from florence_onnx import Florence2, GenerationOptions
from florence_onnx.image import load
def timed(call):
    wall, processor = time.perf_counter(), time.process_time()
    result = call()
    return result, time.perf_counter() - wall, time.process_time() - processor
figures = {}
def note(stage, wall, processor):
    old = figures.get(stage, [wall, processor])
    figures[stage] = [min(old[0], wall), min(old[1], processor)]
model, *times = timed(lambda: Florence2.from_pretrained(job["bundle"], device="cpu", session_options=job["options"]))
note("load", *times)
image = load(job["image"])
for _ in range(job["encodes"] + 1):
    encoded, *times = timed(lambda: model.encode(image))
    if _: note("encode", *times)
for beams in (1, 3):
    options = GenerationOptions(num_beams=beams, max_new_tokens=job["tokens"], min_new_tokens=job["tokens"] - 1)
    for _ in range(job["answers"] + 1):
        prediction, *times = timed(lambda: model.run("<OD>", encoded, options=options))
        if _: note(f"answer, {beams} beam{'s' * (beams > 1)}", *times)
memory = {line.split(":")[0]: int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line[:3] in ("VmH", "Rss")}
print(json.dumps({"figures": figures, "peak_mib": memory["VmHWM"], "anonymous_mib": memory["RssAnon"]}))
"""


def measure(job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs one configuration in a process of its own."""
    command = [sys.executable, "-c", _CHILD]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job['options']} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def best(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the minimum times and the largest memory over several processes."""
    stages = rounds[0]["figures"]
    return {
        "figures": {name: [min(each["figures"][name][i] for each in rounds) for i in (0, 1)] for name in stages},
        "peak_mib": max(each["peak_mib"] for each in rounds),
        "anonymous_mib": max(each["anonymous_mib"] for each in rounds),
    }


def format_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table: wall / CPU seconds of each stage, and MiB."""
    stages = list(next(iter(results.values()))["figures"])
    lines = [f"| options | {' | '.join(stages)} | peak | own |", "|---" * (len(stages) + 3) + "|"]
    for name, found in results.items():
        cells = [f"{found['figures'][stage][0]:.2f} / {found['figures'][stage][1]:.2f}" for stage in stages]
        lines.append(f"| {name} | {' | '.join(cells)} | {found['peak_mib']} | {found['anonymous_mib']} |")
    return "\n".join(lines)


def _parse() -> argparse.Namespace:
    samples = Path(__file__).resolve().parents[2] / "florence_onnx" / "demo" / "samples"
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu.session_options")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path, default=samples / "scene-1.png")
    parser.add_argument("--tokens", type=int, default=24, help="of every answer, forced")
    parser.add_argument("--encodes", type=int, default=1, help="timed per process, after one that is not")
    parser.add_argument("--answers", type=int, default=2, help="timed per process and number of beams")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    return parser.parse_args()


def main() -> None:
    """Command line: prints a Markdown table."""
    arguments = _parse()
    job = {name: getattr(arguments, name) for name in ("tokens", "encodes", "answers")}
    job |= {"bundle": str(arguments.bundle), "image": str(arguments.image)}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in arguments.only}
    for number in range(arguments.rounds):
        for name, found in runs.items():
            found.append(measure({**job, "options": CONFIGURATIONS[name]}))
            print(f"round {number + 1}: {name}, load average {os.getloadavg()[0]:.1f}", file=sys.stderr)
    print(format_table({name: best(found) for name, found in runs.items()}))


if __name__ == "__main__":
    main()
