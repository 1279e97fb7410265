"""Runs the steps, each in a process of its own: `python -m benchmarks.gpu --device cuda --out $OUT`.

Results are written after every step, so an interrupted run loses at most the step in progress, and the same command
continues where the last one stopped. A step that fails is recorded with its reason, and the others go on.
`--device cpu` runs everything on the CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu import hardware, report
from benchmarks.gpu.bars import judge_answers, judge_checks
from benchmarks.gpu.steps import Settings, Step, plan
from benchmarks.gpu.worker import SKIPPED
from benchmarks.models import ROOT

MIN_STEP_S = 15.0
"""Seconds that must be left to start a step."""
_GRACE_S = 5.0


class Report:
    """The result, written as JSON and Markdown after every change."""

    def __init__(self, folder: Path, device: str) -> None:
        """Reads the result of an earlier run in `folder`, if there is one."""
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"gpu-{device}.json"
        self.result: dict[str, Any] = {"device": device, "created": "", "command": "", "steps": {}}
        if self.path.is_file():
            self.result = json.loads(self.path.read_text(encoding="utf-8"))
        self.result["created"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.result["command"] = shlex.join(["python", "-m", "benchmarks.gpu", *map(_relative, sys.argv[1:])])

    @property
    def steps(self) -> dict[str, Any]:
        found: dict[str, Any] = self.result["steps"]
        return found

    def add(self, name: str, outcome: Mapping[str, Any]) -> None:
        """Adds the outcome of a step."""
        self.steps[name] = dict(outcome)
        self.write()

    def write(self) -> None:
        """Writes both files, with the floors that follow from the rates and costs of the steps."""
        self._add_floors()
        self.path.write_text(json.dumps(self.result, indent=1) + "\n", encoding="utf-8")
        self.path.with_suffix(".md").write_text(report.markdown(self.result), encoding="utf-8")

    def _add_floors(self) -> None:
        rates = self.steps.get("rates", {}).get("figures", {}).get("rates")
        for name, step in self.steps.items():
            costs = step.get("figures", {}).get("costs") if name.startswith("floors:") else None
            if costs and rates:
                costs["floor_ms"] = hardware.floor_ms(costs, rates)


def _relative(argument: str) -> str:
    """Returns a path relative to the repository, or its name alone."""
    if not argument.startswith("/"):
        return argument
    path = Path(argument)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def run_step(step: Step, settings: Settings, timeout: float, scratch: Path) -> dict[str, Any]:
    """Runs a step in a process of its own.

    Returns:
        `status` (done, failed, skipped or timeout), `reason`, `seconds`, and the `figures` and `errors` that it wrote.
    """
    file = scratch / "figures.json"
    file.unlink(missing_ok=True)
    given = {"step": vars(step), "settings": settings.dump(), "figures": str(file)}
    command = [sys.executable, "-m", "benchmarks.gpu.worker", json.dumps(given)]
    begin = time.monotonic()
    log = scratch / "errors.txt"
    with log.open("w") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(step), stderr=errors, start_new_session=True)
        code = _wait(process, timeout)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    status = {0: "done", SKIPPED: "skipped", None: "timeout"}.get(code, "failed")
    reason = "" if status == "done" else " | ".join(lines[-3:])[-800:] if code is not None else f"after {timeout:.0f} s"
    if code is not None and code < 0:
        reason = f"ended by signal {-code}; {reason}"
    found = json.loads(file.read_text()) if file.is_file() else {"figures": {}, "errors": {}}
    return {"status": status, "reason": reason, "seconds": time.monotonic() - begin, **found}


def _environment(step: Step) -> dict[str, str]:
    """Adds the CUDA and cuDNN of NVIDIA's wheels to the library path, except for the step `start`."""
    paths = ([] if step.kind == "start" else [hardware.library_path()]) + [os.environ.get("LD_LIBRARY_PATH", "")]
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(path for path in paths if path)}


def _wait(process: subprocess.Popen[bytes], timeout: float) -> int | None:
    """Returns the exit code, or None after a timeout. Kills a process that still runs, with its children."""
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(_GRACE_S)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["large", "base"], help="demo, base, large")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-results"), help="folder of the results; the next run continues them"
    )
    parser.add_argument("--carried", type=Path, default=ROOT / ".gpu", help="folder that benchmarks.gpu.prepare wrote")
    parser.add_argument("--work", type=Path, default=ROOT / ".gpu" / "work", help="folder for the bundles")
    parser.add_argument("--steps", default="", help="comma-separated prefixes of step names; default: all")
    parser.add_argument("--without", default="", help="comma-separated prefixes of steps to leave out")
    parser.add_argument("--again", action="store_true", help="also run steps that are done")
    parser.add_argument(
        "--budget-s", type=float, default=540.0, help="seconds after which no step is started or kept running"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="the first must be 1")
    parser.add_argument("--images", type=int, default=3, help="number of sample images whose answers are compared")
    parser.add_argument("--quick", action="store_true", help="every figure once, with tiny batches: a smoke test")
    parser.add_argument("--list", action="store_true", help="print the names of the steps")
    return parser.parse_args()


def _chosen(arguments: argparse.Namespace) -> list[Step]:
    def begins(name: str, given: str) -> bool:
        return any(name.startswith(each) for each in given.split(",") if each)

    steps = plan(arguments.device, arguments.sizes)
    wanted = [step for step in steps if not arguments.steps or begins(step.name, arguments.steps)]
    return [step for step in wanted if not begins(step.name, arguments.without)]


def main() -> None:
    """Runs the steps. Exit code 1: a step failed or was not reached, or answers or logits are wrong."""
    arguments = _parse()
    steps = _chosen(arguments)
    if arguments.list:
        print("\n".join(step.name for step in steps))
        return
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the step in progress is killed too
    kept = Report(arguments.out, arguments.device)
    settings = Settings(
        arguments.device,
        str(arguments.carried.resolve()),
        str(arguments.work.resolve()),
        arguments.quick,
        arguments.images,
        arguments.batches,
    )
    arguments.work.mkdir(parents=True, exist_ok=True)
    for step in steps:
        if kept.steps.get(step.name, {}).get("status") == "done" and not arguments.again:
            continue
        left = arguments.budget_s - (time.monotonic() - begin)
        if left < MIN_STEP_S:
            print(f"{step.name}: not started, {left:.0f} s are left", flush=True)
            continue
        print(f"{step.name} ({left:.0f} s left)", flush=True)
        kept.add(step.name, run_step(step, settings, min(step.timeout_s, left), arguments.work))
        outcome = kept.steps[step.name]
        print(f"{step.name}: {outcome['status']} in {outcome['seconds']:.0f} s {outcome['reason']}", flush=True)
    kept.write()
    print(kept.path.with_suffix(".md").read_text(encoding="utf-8"))
    sys.exit(_exit_code(kept.steps, steps))


def _exit_code(found: Mapping[str, Any], steps: list[Step]) -> int:
    is_finished = all(found.get(step.name, {}).get("status") in ("done", "skipped") for step in steps)
    is_right = not any("MISSED" in said for _, said in [*judge_answers(found), *judge_checks(found)])
    return 0 if is_finished and is_right else 1


if __name__ == "__main__":
    main()
