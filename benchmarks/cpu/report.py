"""A result as tables, on the terminal and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.cpu.bars import value
from benchmarks.cpu.jobs import DERIVED, STAGES
from benchmarks.cpu.peers import REFERENCE

Result = Mapping[str, Any]

_COLUMNS: tuple[tuple[str, str, float, int], ...] = (
    ("preprocess", "preprocess ms", 1e3, 0),
    ("vision", "vision ms", 1e3, 0),
    ("text_encoder", "text encoder ms", 1e3, 0),
    ("first_tokens_greedy", "2 tokens ms", 1e3, 0),
    ("first_tokens_beams", "2 tokens, beams ms", 1e3, 0),
    ("step_greedy", "ms/token greedy", 1e3, 1),
    ("step_beams", "ms/token beams", 1e3, 1),
    ("end_to_end_greedy", "end to end greedy s", 1, 2),
    ("end_to_end_beams", "end to end beams s", 1, 2),
    ("second_task", "second task s", 1, 2),
    ("peak_rss", "peak MB", 1e-6, 0),
    ("cold_start", "cold start s", 1, 2),
)
"""Stage, heading, factor from seconds or bytes, decimals."""
_BAR_RATIOS = ("ratio", "ratio_of_minima", "ratio_at_floor")
_RATIOS = ("vision", "step_greedy", "step_beams", "end_to_end_greedy", "end_to_end_beams")
_RIVALS = (REFERENCE, "transformers-bf16", "openvino-bf16")
_FLOORED = ("vision", "text_encoder", "step_greedy", "step_beams", "end_to_end_greedy", "end_to_end_beams")


def tables(result: Result) -> list[Table]:
    """Makes the tables: times (median and minimum), ratios, distances from the floor, and the bars."""
    return [
        _times(result, "median"),
        _times(result, "min"),
        *(_ratios(result, rival) for rival in _RIVALS if rival in result["peers"]),
        _distances(result),
        _bars(result),
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), box=box.MARKDOWN, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold", no_wrap=index == 0)
    return table


def _row(name: str, cells: list[float | None], show: Callable[[int, float], str]) -> list[str | Text]:
    return [Text(name), *("" if cell is None else show(index, cell) for index, cell in enumerate(cells))]


def _times(result: Result, statistic: str) -> Table:
    title = {"median": "Medians", "min": "Minima"}[statistic]
    table = _table(title, "peer", *(heading for _, heading, _, _ in _COLUMNS), "tokens as fp32")
    for name, peer in result["peers"].items():
        cells = [value(result, name, stage, statistic) for stage, *_ in _COLUMNS]
        row = _row(name, cells, lambda i, x: f"{x * _COLUMNS[i][2]:.{_COLUMNS[i][3]}f}")
        table.add_row(*row, _shares(peer.get("agreement")))
    return table


def _shares(agreement: Mapping[str, float] | None) -> str:
    return " / ".join(f"{share:.0%}" for share in agreement.values()) if agreement else ""


def _ratios(result: Result, rival: str) -> Table:
    title = f"Times as fast as {result['peers'][rival]['title']} (medians)"
    table = _table(title, "peer", *(_heading(stage) for stage in _RATIOS))
    for name in result["peers"]:
        cells = [_quotient(value(result, rival, stage), value(result, name, stage)) for stage in _RATIOS]
        table.add_row(*_row(name, cells, lambda _, x: f"{x:.2f}"))
    return table


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _distances(result: Result) -> Table:
    rates = result["floor"].get("rates", {})
    known = {"fp32": "fp32", "int8": "int8", "bf16": "bf16"}
    shown = [f"{rates[name] / 1e9:.0f} GFLOP/s {label}" for name, label in known.items() if rates.get(name)]
    read = f"{rates['read'] / 1e9:.1f} GB/s read" if rates.get("read") else "not measured"
    title = f"Times the floor of its precision (medians; {', '.join([*shown, read])})"
    table = _table(title, "peer", *(_heading(stage) for stage in _FLOORED))
    for name, peer in result["peers"].items():
        floor = result["floor"].get("stages", {}).get(peer["precision"], {})
        cells = [_quotient(value(result, name, stage), floor.get(stage)) for stage in _FLOORED]
        table.add_row(*_row(name, cells, lambda _, x: f"{x:.2f}"))
    for precision, floor in result["floor"].get("stages", {}).items():
        row = [f"{floor[stage] * 1e3:.4g} ms" for stage in _FLOORED]
        table.add_row(f"the floor itself, {precision}", *row)
    return table


def _heading(stage: str) -> str:
    return stage.replace("_", " ")


def _bars(result: Result) -> Table:
    table = _table("Bars", "bar", "peer", "rival", "limit", "ratio", "of minima", "at the floor", "status")
    signs = {"times as fast": "at least", "of its time": "at most", "equal": "exactly"}
    for bar in result["bars"]:
        ratios = [f"{bar[name]:.2f}" if bar.get(name) is not None else "" for name in _BAR_RATIOS]
        status = bar["status"] if "reason" not in bar else f"{bar['status']} ({bar['reason']})"
        limit = f"{signs[bar['kind']]} {bar['limit']:g}"
        table.add_row(*map(Text, (bar["text"], bar["peer"], bar["rival"], limit, *ratios, status)))
    return table


def print_to(console: Console, result: Result) -> None:
    """Prints the summary, the tables and the remarks."""
    console.print(Text(_summary(result)))
    for table in tables(result):
        console.print(table)
    for line in _remarks(result):
        console.print(Text(line))


def markdown(result: Result) -> str:
    """Returns the summary, the tables and the remarks as a Markdown document."""
    parts = [f"# {result['model']['name']} on {result['machine']['cpu']}, {result['created'][:10]}", _summary(result)]
    for table in tables(result):
        parts.append(f"## {table.title}\n\n{_render(table)}")
    parts.append("## Remarks\n\n" + "\n".join(_remarks(result)))
    return "\n\n".join(parts) + "\n"


def _render(table: Table) -> str:
    table.title = None
    buffer = io.StringIO()
    Console(file=buffer, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip().splitlines())


def _summary(result: Result) -> str:
    workload, machine, model = result["workload"], result["machine"], result["model"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"{model['name']} ({model['weights']}), one image {model['image_size'][0]} x {model['image_size'][1]}, prompt "
        f"{workload['first']['task']} ({model['prompt_tokens']} tokens), {workload['num_tokens']} forced tokens, greedy and "
        f"{workload['num_beams']} beams, {workload['threads']} threads of {machine['cores']} cores, {result['rounds']} rounds of "
        f"{workload['repeats']} timings. Floor: {result['floor'].get('vision_flops', 0) / 1e9:.0f} GFLOP vision, "
        f"{result['floor'].get('text_encoder_flops', 0) / 1e9:.0f} text encoder, "
        f"{result['floor'].get('decoder_parameters', 0) / 1e6:.0f} M weights a decode step.\n\n"
        f"{machine['cpu']} ({machine['family']}; {' '.join(machine['flags'])}), {machine['memory_bytes'] / 1e9:.0f} GB, "
        f"{machine['system']}, load {machine['load_before']} before. {versions}.\n\nRepeat: {result['command']}"
    )


def _remarks(result: Result) -> list[str]:
    absent = [f"- {name} is not here: {reason}" for name, reason in result["absent"].items()]
    titles = [f"- {name} is {peer['title']}" for name, peer in result["peers"].items()]
    notes = [f"- {name}: {note}" for name, peer in result["peers"].items() for note in peer["notes"]]
    checks = [f"- CHECK: {check}" for check in result["checks"]]
    default = result["default"] or "no peer"
    meaning = [f"- {stage}: {text}" for stage, text in {**STAGES, **DERIVED}.items()]
    return [
        f"- The default in the bars is {default} ({result['default_reason']}).",
        "- At the floor: the ratio if our peer took no longer than its floor, and the rival what it took here. Where that misses",
        "  the limit, nothing reaches the bar on this machine.",
        *checks,
        *absent,
        *titles,
        *notes,
        *meaning,
    ]
