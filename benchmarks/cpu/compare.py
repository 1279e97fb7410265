"""`python -m benchmarks.cpu.compare`: this runtime and its peers in turn, in one run, on the same work.

How it is kept fair: the same weights, image, prompt, generation rules, number of tokens and threads for all; each peer in a fresh
process, so that neither memory nor thread pools mix; the peers take turns in every round, so that a busy minute hits all of them;
one answer and one with beams before anything is timed. A peer that cannot run is listed with the reason.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from tokenizers import Tokenizer

from benchmarks import machine
from benchmarks.checkpoints import SIZES
from benchmarks.costs import Costs
from benchmarks.cpu import bars, peers, report, results
from benchmarks.cpu.jobs import Job, Peer, Prompt, Workload
from benchmarks.cpu.processes import FailedError, Launcher
from benchmarks.models import ROOT, Models, PreparationError
from florence_onnx import tasks
from florence_onnx.bundles import bundle
from florence_onnx.errors import FlorenceError
from florence_onnx.runtime import cpu

IMAGE = ROOT / "export" / "verification" / "photograph.jpg"
_console = Console(stderr=True)
_LARGE_IMAGE = 512
"""Pixels of a side from which a model is no toy: only then is memory read far beyond the caches."""


class Comparison:
    """The state of one run; complete enough to be written at any moment."""

    def __init__(self, models: Models, chosen: Sequence[Peer], workload: Workload, launcher: Launcher) -> None:
        self.models = models
        self.peers = list(chosen)
        self.workload = workload
        self.launcher = launcher
        self.runs: dict[str, list[dict[str, Any]]] = {peer.name: [] for peer in chosen}
        self.absent: dict[str, str] = {}
        self.rates: list[dict[str, Any]] = []
        self.rounds = 0
        self.machine = machine.describe()
        self.costs = Costs.read(models.path("checkpoint"))

    def prepare(self) -> None:
        """Makes what the peers load, so that no export runs between two measurements."""
        for peer in self.peers:
            try:
                self.models.path(peer.model)
            except PreparationError as error:
                self.absent[peer.name] = f"{peer.model} cannot be made: {error}"
        self.machine = machine.describe()

    def run_round(self, budget: float) -> None:
        """Every peer once, and the floor."""
        self._measure_floor()
        for peer in self.peers:
            if peer.name not in self.absent:
                self._run_peer(peer, budget)
        self.rounds += 1

    def _measure_floor(self) -> None:
        shapes = [[product.rows, product.inner, product.columns] for product in self.costs.vision_products()]
        is_large = max(self.costs.image_size) >= _LARGE_IMAGE
        arguments: dict[str, Any] = {"shapes": shapes, "threads": self.workload.threads}
        if not is_large:
            arguments |= {"read_bytes": 64 * 2**20, "seconds": 0.01}
        _console.log(f"round {self.rounds + 1}: what the machine can do")
        try:
            self.rates.append(self.launcher.call([sys.executable, "-m", "benchmarks.cpu.rates", json.dumps(arguments)]))
        except FailedError as error:
            self.absent["floor"] = str(error)

    def _run_peer(self, peer: Peer, budget: float) -> None:
        _console.log(f"round {self.rounds + 1}: {peer.title}", markup=False)
        checkpoint = str(self.models.path("checkpoint"))
        job = Job(peer, str(self.models.path(peer.model)), checkpoint, self.workload, 0.0, budget)
        try:
            found = self.launcher.run(job)
        except FailedError as error:
            found = {"absent": str(error)}
        if "absent" not in found:
            self.runs[peer.name].append(found)
            return
        self.absent[peer.name] = found["absent"]
        _console.log(f"  {found['absent']}", markup=False)

    def result(self, command: str, default: str | None) -> dict[str, Any]:
        """What was measured so far, ready for JSON."""
        by_name = {peer.name: peer for peer in self.peers}
        found = {
            name: results.summarize(by_name[name], runs, self.workload) for name, runs in self.runs.items() if runs
        }
        prompt_tokens = self._prompt_tokens()
        floor = {}
        if self.rates:
            floor = results.floors(self.costs, results.best_rates(self.rates), self.workload, prompt_tokens)
        checks = results.compare_tokens(found, self.workload.num_tokens)
        checks += results.find_implausible(found, floor) if floor else []
        result: dict[str, Any] = {
            "format": 1,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": command,
            "model": self._model(prompt_tokens),
            "workload": self._describe_workload(),
            "rounds": self.rounds,
            "machine": self.machine,
            "versions": {key: version for peer in found.values() for key, version in peer["versions"].items()},
            "checks": checks,
            "peers": found,
            "absent": self.absent,
            "floor": floor,
        }
        chosen, reason = _default(found, default)
        return {**result, "default": chosen, "default_reason": reason, "bars": bars.evaluate(result, chosen)}

    def _describe_workload(self) -> dict[str, Any]:
        described = dataclasses.asdict(self.workload)
        del described["resized_image"]
        return {**described, "image": Path(self.workload.image).name}

    def _prompt_tokens(self) -> int:
        tokenizer = Tokenizer.from_file(str(self.models.path("checkpoint") / "tokenizer.json"))
        return len(tokenizer.encode(self.workload.first.text).ids)

    def _model(self, prompt_tokens: int) -> dict[str, Any]:
        is_random = self.models.name in SIZES
        return {
            "name": f"Florence-2-{self.models.name}" if is_random else self.models.name,
            "weights": "random weights" if is_random else "its own weights",
            "image_size": list(self.costs.image_size),
            "num_image_tokens": self.costs.num_image_tokens,
            "prompt_tokens": prompt_tokens,
        }


def _default(found: Mapping[str, Any], asked: str | None) -> tuple[str | None, str]:
    """Which of our peers stands for what a user gets."""
    if asked is not None:
        return f"ours-{asked}", "as asked for"
    own = [name for name in found if name.startswith("ours-")]
    if not own:
        return None, "none of ours was measured"
    fastest = min(own, key=lambda name: found[name]["stages"]["end_to_end_greedy"]["median"])
    return fastest, "the fastest measured end to end; --default names another"


def known_precisions() -> list[str]:
    """What `python -m export` writes for a CPU, as far as this environment can tell."""
    try:
        from export.precisions.optimize import PRECISIONS
    except ImportError:
        return ["fp32"]
    return [name for name in PRECISIONS if name != "fp16"]  # fp16 is for GPUs: a CPU computes it in fp32


def choose(ours: Sequence[str], bundles: Mapping[str, Path], names: Sequence[str]) -> list[Peer]:
    """The peers to run, in their order.

    Args:
        ours: Names of our bundles.
        bundles: The directories of those that exist already.
        names: Of peers; empty means all.

    Raises:
        typer.BadParameter: A name is unknown, or a bundle cannot be read.
    """
    known = {
        peer.name: peer for peer in (*peers.RIVALS, *(_with_precision(peer, bundles) for peer in peers.ours(ours)))
    }
    unknown = [name for name in names if name not in known]
    if unknown:
        raise typer.BadParameter(f"unknown peer {unknown[0]!r}; choose from {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def _with_precision(peer: Peer, bundles: Mapping[str, Path]) -> Peer:
    path = bundles.get(peer.model.partition(":")[2])
    if path is None:
        return peer
    try:
        precision = bundle.read(path).precision
    except FlorenceError as error:
        raise typer.BadParameter(str(error)) from error
    return dataclasses.replace(peer, precision=precision, is_exact=precision == "fp32")


def _parse_ours(text: str | None) -> tuple[list[str], dict[str, Path]]:
    entries = text.split(",") if text else known_precisions()
    bundles = {name: Path(path) for name, _, path in (entry.partition("=") for entry in entries) if path}
    return [entry.partition("=")[0] for entry in entries], bundles


def _pairs(entries: Sequence[str]) -> dict[str, str]:
    pairs = [entry.partition("=") for entry in entries]
    wrong = [name for name, _, path in pairs if not path]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r} must be PEER=PYTHON")
    return {name: str(Path(path).absolute()) for name, _, path in pairs}  # resolving would leave the environment


def _workload(models: Models, image: Path, **numbers: int) -> Workload:
    first, second = (Prompt(task.token, task.format_prompt()) for task in (tasks.OBJECT_DETECTION, tasks.CAPTION))
    resized = models.resize(image)
    return Workload(str(image.resolve()), str(resized), first, second, generation=models.generation(), **numbers)


def _command() -> str:
    """The command line, without paths of this machine."""
    arguments = []
    for argument in sys.argv[1:]:
        before, equals, path = argument.rpartition("=")
        relative = os.path.relpath(path, ROOT) if path.startswith("/") else path
        arguments.append(before + equals + relative)
    return shlex.join(["python", "-m", "benchmarks.cpu.compare", *arguments])


def file_name(result: Mapping[str, Any]) -> str:
    """`<date>-<cpu>-<model>`, in lower case."""
    cpu = re.sub(r"\(r\)|\(tm\)|\bcpu\b|@.*|\bprocessor\b", " ", result["machine"]["cpu"].lower())
    cores = f"{result['workload']['threads']}threads"
    name = result["model"]["name"].removeprefix("Florence-2-")
    return "-".join([result["created"][:10], re.sub(r"[^a-z0-9]+", "-", f"{cpu} {cores} {name}".lower()).strip("-")])


def write(result: Mapping[str, Any], folder: Path, *, is_complete: bool) -> Path:
    """Writes `.md` and `.json`, and returns the path of the latter.

    An incomplete result has a name of its own, so that it never replaces a complete one; the complete one replaces it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, incomplete = (folder / f"{file_name(result)}{ending}.json" for ending in ("", "-incomplete"))
    if is_complete:
        for ending in (".json", ".md"):
            incomplete.with_suffix(ending).unlink(missing_ok=True)
    else:
        path = incomplete
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(report.markdown(result), encoding="utf-8")
    return path


def compare(
    size: Annotated[str, typer.Option(help=f"Random-weight checkpoint: {', '.join(SIZES)}.")] = "base",
    checkpoint: Annotated[Path | None, typer.Option(help="Folder with real weights, instead of --size.")] = None,
    image: Annotated[Path, typer.Option(help="What is asked about.", exists=True)] = IMAGE,
    tokens: Annotated[int, typer.Option(help="Tokens of every answer.", min=4)] = 64,
    beams: Annotated[int, typer.Option(help="Beams of the second search.", min=2)] = 3,
    threads: Annotated[int, typer.Option(help="For every peer; default: all cores.", min=1)] = cpu.num_cores(),
    rounds: Annotated[int, typer.Option(help="Processes per peer, in turn.", min=1)] = 3,
    repeats: Annotated[int, typer.Option(help="Timings per stage and process.", min=1)] = 2,
    peer_names: Annotated[str, typer.Option("--peers", help="Comma-separated; default: all.")] = "",
    ours: Annotated[
        str | None,
        typer.Option(
            help="Our bundles, comma-separated: precisions (exported on demand) or NAME=DIRECTORY. Default: all."
        ),
    ] = None,
    default: Annotated[
        str | None, typer.Option(help="Which of them is a user's default; otherwise the fastest.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints and exports are kept and found here.")] = ROOT
    / "benchmarks"
    / ".work",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "benchmarks" / "results",
    node: Annotated[Path, typer.Option(help="Where npm installed transformers.js.")] = ROOT / "benchmarks" / ".node",
    interpreter: Annotated[
        list[str] | None, typer.Option(help="PEER=PYTHON for a peer in another environment; may be repeated.")
    ] = None,
    run_all: Annotated[
        bool, typer.Option("--all", help="Also what the CPU lacks the arithmetic for, and takes minutes an answer.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Estimated seconds an answer beyond which --all is needed.")] = 60.0,
    timeout: Annotated[float, typer.Option(help="Seconds until a process is given up.")] = 3600.0,
) -> None:
    """Measures us and every peer in turn; prints tables and one line of JSON; writes both.

    Ctrl-C, SIGTERM and crashes lose nothing that was measured before.
    """
    if checkpoint is None and size not in SIZES:
        raise typer.BadParameter(f"unknown size {size!r}; choose from {', '.join(SIZES)}")
    names, bundles = _parse_ours(ours)
    chosen = choose(names, bundles, [name for name in peer_names.split(",") if name])
    models = Models(str(checkpoint or size), work, bundles=bundles, progress=_console.log)
    launcher = Launcher(threads, timeout, work.resolve(), node, _pairs(interpreter or []))
    workload = _workload(models, image, num_tokens=tokens, num_beams=beams, threads=threads, repeats=repeats)
    comparison = Comparison(models, chosen, workload, launcher)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being ended is no worse than Ctrl-C
    try:
        comparison.prepare()
        for _ in range(rounds):
            comparison.run_round(float("inf") if run_all else budget)
            write(comparison.result(_command(), default), out, is_complete=False)
    except KeyboardInterrupt:
        _console.log("interrupted: what was measured is kept")
    _finish(comparison.result(_command(), default), out, is_complete=comparison.rounds == rounds)


def _finish(result: Mapping[str, Any], out: Path, *, is_complete: bool) -> None:
    path = write(result, out, is_complete=is_complete)
    is_narrow = not _console.is_terminal
    report.print_to(Console(stderr=True, width=220 if is_narrow else None), result)
    _console.print(str(path), markup=False, soft_wrap=True)
    typer.echo(json.dumps(result))


if __name__ == "__main__":
    typer.run(compare)
