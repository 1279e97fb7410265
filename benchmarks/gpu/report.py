"""A result as Markdown: bars, all figures, and errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.gpu.bars import Judged, figure, judge, judge_answers, judge_checks

Result = Mapping[str, Any]
"""The result that `__main__` writes: `device`, `created`, `command`, and `steps` by name."""

COLUMNS: tuple[tuple[str, str, str, float], ...] = (
    ("vision ms", "vision_b1", "ms", 1),
    ("vision device ms", "encode_b1_device", "device_ms", 1),
    ("step greedy ms", "step_greedy_b1", "ms", 1),
    ("device", "step_greedy_b1_device", "device_ms", 1),
    ("step 3 beams ms", "step_beams_b1", "ms", 1),
    ("device", "step_beams_b1_device", "device_ms", 1),
    ("caption ms", "caption_b1", "ms", 1),
    ("128 tokens ms", "greedy128_b1", "ms", 1),
    ("captions/s at 8", "caption_b8", "ms", 8),
    ("captions/s at 32", "caption_b32", "ms", 32),
    ("throughput captions/s", "throughput_captions", "per_s", 1),
    ("objects/s", "throughput_objects", "per_s", 1),
    ("peak MB, batch 1", "memory_b1", "peak_mb", 1),
    ("peak MB", "memory_all", "peak_mb", 1),
)
"""Heading, figure, its field, and number of images; if it is more than 1, the time becomes a rate."""


def markdown(result: Result) -> str:
    """Returns the whole report."""
    steps = result["steps"]
    sizes = list(dict.fromkeys(name.split(":")[1] for name in steps if name.startswith("ours:")))
    parts = [f"# {_gpu_name(steps)}, {result['created'][:10]}", _facts(result)]
    for size in sizes:
        parts.append(f"## Bars, {size}" + ("" if size == "large" else " (set for large)"))
        parts.append(_table(("bar", "limit", "found", "variant", "status"), map(_bar_row, judge(steps, size))))
        parts.append(f"## All variants, {size}")
        parts.append(_table(("variant", *(column[0] for column in COLUMNS)), _variant_rows(steps, size)))
        parts.append(f"## Single graphs, {size}")
        parts.append(_table(("graph, variant, size", "wall ms", "device ms", "kernels"), _graph_rows(steps, size)))
        parts.append(_floor_line(steps, size))
    parts.append("## Answers of the demo model, logits at full size")
    parts.append(_table(("compared", "found"), [*judge_answers(steps), *judge_checks(steps)]))
    parts.append("## Steps\n\n" + "\n".join(_step_lines(steps)))
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heading)} |", f"|{'---|' * len(heading)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _gpu_name(steps: Mapping[str, Any]) -> str:
    figures = steps.get("hardware", {}).get("figures", {})
    return str(figures.get("gpu", {}).get("name") or figures.get("machine", {}).get("cpu", "unknown"))


def _facts(result: Result) -> str:
    figures = result["steps"].get("hardware", {}).get("figures", {})
    packages = ", ".join(f"{name} {version}" for name, version in figures.get("packages", {}).items())
    gpu = ", ".join(f"{name} {value}" for name, value in figures.get("gpu", {}).items())
    rates = result["steps"].get("rates", {}).get("figures", {}).get("rates", {})
    shown = [f"{rates[name] / 1e12:.3g} {unit}" for name, unit in _RATES.items() if name in rates]
    start = result["steps"].get("start", {})
    lines = [f"Device `{result['device']}`. {packages}.", gpu, f"Measured: {', '.join(shown)}." if shown else ""]
    lines.append(f"Without a library path of ours the provider: {start.get('status', 'not tried')}.")
    lines.append(f"Repeat: `{result['command']}`")
    return "\n\n".join(line for line in lines if line)


_RATES = {"copy": "TB/s copied (read and written)", "float16": "TFLOP/s fp16", "bfloat16": "bf16", "float32": "fp32"}


def _bar_row(judged: Judged) -> list[str]:
    bar = judged.bar
    value = "" if judged.value is None else f"{judged.value:.3g} {bar.unit}"
    return [bar.text, f"{bar.kind} {bar.limit:g} {bar.unit}", value, judged.variant, judged.status]


def _variant_rows(steps: Mapping[str, Any], size: str) -> list[list[str]]:
    names = [name for name in steps if name.partition(":")[0] in ("ours", "plain", "transformers")]
    rows = []
    for name in (name for name in names if name.split(":")[1] == size):
        row = [name]
        for _, key, field, images in COLUMNS:
            value = figure(steps, name, key, field)
            if value is not None and images > 1:
                value = images / value * 1e3
            row.append("" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}")
        rows.append(row)
    return rows


def _graph_rows(steps: Mapping[str, Any], size: str) -> list[list[str]]:
    step = f"graphs:{size}"
    names = steps.get(step, {}).get("figures", {})
    rows = []
    for name in (name for name in names if figure(steps, step, name) is not None):
        device = figure(steps, step, f"{name} device", "device_ms")
        kernels = figure(steps, step, f"{name} device", "kernels")
        wall = figure(steps, step, name)
        rows.append([name, f"{wall:.3f}", *("" if each is None else f"{each:.3f}" for each in (device, kernels))])
    return rows


def _floor_line(steps: Mapping[str, Any], size: str) -> str:
    costs = steps.get(f"floors:{size}", {}).get("figures", {}).get("costs", {})
    floor = costs.get("floor_ms", {})
    if not floor:
        return ""
    shown = ", ".join(f"{name.replace('_', ' ')} {value:.3f} ms" for name, value in floor.items())
    work = f"{costs['vision_gflop']:.0f} GFLOP vision, {costs['text_encoder_gflop']:.0f} text encoder"
    return f"Floor in fp16 at the measured rates: {shown} ({work}, {costs['step_mb']['step_greedy']:.0f} MB a step)."


def _step_lines(steps: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, step in steps.items():
        reason = f": {step['reason']}" if step.get("reason") else ""
        lines.append(f"- {name}: {step['status']} in {step['seconds']:.0f} s{reason}".replace("\n", " "))
        lines += [f"  - {key}: {error}".replace("\n", " ") for key, error in step.get("errors", {}).items()]
    return lines
