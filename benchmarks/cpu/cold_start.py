"""Cold start and memory: from the start of a process to its first answer.

    python -m benchmarks.cpu.cold_start BUNDLE --repeats 5 --threads 2

Every repetition is a fresh process; the result is the minimum and the median of each figure over all of them. A table
is printed to standard error, and one line of JSON to standard output. Linux only: memory is read from
`/proc/self/status`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

MIB = 2**20

_CHILD = """
import time
begin = time.monotonic()
import json, sys
job = json.load(sys.stdin)
ready = time.monotonic()
import florence_onnx
imported = time.monotonic()
def memory():
    lines = (line.split() for line in open("/proc/self/status"))
    return {words[0].rstrip(":"): int(words[1]) / 1024 for words in lines if words[0][:5] in ("VmHWM", "RssAn", "RssFi")}
model = florence_onnx.Florence2.from_pretrained(job["bundle"], **job["load"])
loaded, after_load = time.monotonic(), memory()
options = florence_onnx.GenerationOptions(**job["options"])
prediction = model.run(job["task"], job["image"], options=options)
answered, at_end, clock = time.monotonic(), memory(), time.process_time()
import onnxruntime
print(json.dumps({
    "interpreter_s": begin - job["started"],
    "import_s": imported - ready,
    "load_s": loaded - imported,
    "answer_s": answered - loaded,
    "total_s": answered - job["started"] - (ready - begin),
    "processor_s": clock,
    "load_anonymous_mib": after_load["RssAnon"],
    "load_mapped_mib": after_load["RssFile"],
    "load_peak_mib": after_load["VmHWM"],
    "anonymous_mib": at_end["RssAnon"],
    "mapped_mib": at_end["RssFile"],
    "peak_mib": at_end["VmHWM"],
    "onnxruntime": onnxruntime.__version__,
    "provider": model.info()["provider"],
    "num_tokens": len(prediction.token_ids),
}))
"""


@dataclass(frozen=True)
class ColdStart:
    """One process from its start to its first answer."""

    interpreter_s: float
    """Seconds until Python runs our first line."""
    import_s: float
    """Seconds of `import florence_onnx`."""
    load_s: float
    """Seconds of `from_pretrained`, the import of ONNX Runtime included."""
    answer_s: float
    """Seconds of the first answer: image file, vision encoder, prompt and all tokens."""
    total_s: float
    """Seconds from the start of the process to the answer."""
    processor_s: float
    """CPU time of all threads until the answer, in seconds; it depends less on other processes than wall time."""
    load_anonymous_mib: float
    """Anonymous memory after loading, in MiB: weights that were copied or packed are in it."""
    load_mapped_mib: float
    """Memory mapped from files after loading, in MiB: shared between processes, and reclaimed under memory pressure."""
    load_peak_mib: float
    """Peak resident memory until then, in MiB."""
    anonymous_mib: float
    """Anonymous memory after the answer, in MiB."""
    mapped_mib: float
    """Memory mapped from files after the answer, in MiB."""
    peak_mib: float
    """Peak resident memory in MiB: `VmHWM`, since `ru_maxrss` counts what the parent held at the fork."""
    onnxruntime: str
    """Version of ONNX Runtime."""
    provider: str
    """Execution provider of the vision encoder."""
    num_tokens: int
    """Tokens of the answer, the first two included."""


def measure(
    bundle: str | Path,
    image: str | Path,
    *,
    task: str = "<OD>",
    options: Mapping[str, Any] | None = None,
    load: Mapping[str, Any] | None = None,
    python: str = sys.executable,
    has_cold_files: bool = False,
) -> ColdStart:
    """Runs one fresh process and times it.

    Args:
        bundle: The model, as for `from_pretrained`.
        image: An image file.
        task: Token or slug of the task.
        options: Fields of `GenerationOptions`; None keeps the model's defaults.
        load: More arguments of `from_pretrained`; they must be JSON.
        python: The Python interpreter; it must be able to import `florence_onnx`.
        has_cold_files: Whether to drop the bundle's files from the page cache first, as after a reboot.

    Raises:
        RuntimeError: The process failed; the message is its output.
    """
    if has_cold_files:
        forget_pages(Path(bundle))
    job = {
        "bundle": str(bundle),
        "image": str(image),
        "task": task,
        "options": dict(options or {}),
        "load": dict(load or {}),
        "started": time.monotonic(),  # the monotonic clock is the same in all processes
    }
    command = [python, "-c", _CHILD]
    # Users have compiled modules from the second start on.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr[-2000:]}")
    return ColdStart(**json.loads(done.stdout.splitlines()[-1]))


def forget_pages(folder: Path) -> None:
    """Drops the files of a folder from the page cache, except those that another process has mapped."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summarize(runs: Sequence[ColdStart]) -> dict[str, Any]:
    """Returns `min` and `median` of every float by name, and the other fields of the first run."""
    summary: dict[str, Any] = {"repeats": len(runs)}
    for each in fields(ColdStart):
        values = [asdict(run)[each.name] for run in runs]
        if isinstance(values[0], float):
            summary[each.name] = {"min": round(min(values), 3), "median": round(statistics.median(values), 3)}
        else:
            summary[each.name] = values[0]
    return summary


def format_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns a Markdown table with a row per figure and a column per summary: minimum, and median in parentheses."""
    names = [each.name for each in fields(ColdStart) if each.type in ("float", float)]
    rows = [["", *summaries], ["---"] * (len(summaries) + 1)]
    for name in names:
        unit = ".2f" if name.endswith("_s") else ".0f"
        cells = [f"{each[name]['min']:{unit}} ({each[name]['median']:{unit}})" for each in summaries.values()]
        rows.append([name, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def weights_mib(bundle: Path) -> float:
    """Returns the size of all files of a bundle, in MiB."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file()) / MIB


def _parse() -> argparse.Namespace:
    samples = Path(__file__).resolve().parents[2] / "florence_onnx" / "demo" / "samples"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.cold_start", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--image", type=Path, default=samples / "scene-1.png")
    parser.add_argument("--task", default="<OD>")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the answer, forced; greedy")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, help="intra_op_num_threads")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cold-files", action="store_true", help="drop the bundle from the page cache each time")
    parser.add_argument("--load", type=json.loads, default={}, help="further arguments of from_pretrained, as JSON")
    return parser.parse_args()


def main() -> None:
    """Command line: prints a table and one line of JSON."""
    arguments = _parse()
    load = {"device": arguments.device, **arguments.load}
    if arguments.threads:
        load["session_options"] = {**load.get("session_options", {}), "intra_op_num_threads": arguments.threads}
    options = {"num_beams": 1, "max_new_tokens": arguments.tokens, "min_new_tokens": arguments.tokens - 1}
    runs = [
        measure(
            arguments.bundle,
            arguments.image,
            task=arguments.task,
            options=options,
            load=load,
            has_cold_files=arguments.cold_files,
        )
        for _ in range(arguments.repeats)
    ]
    summary = {
        **summarize(runs),
        "bundle_mib": round(weights_mib(arguments.bundle), 1),
        "load_arguments": load,
        "has_cold_files": arguments.cold_files,
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
    }
    print(format_table({arguments.bundle.name: summary}), file=sys.stderr)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
