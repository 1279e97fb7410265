"""The report of a comparison: tables on the terminal, Markdown and JSON."""

from __future__ import annotations

import dataclasses
import datetime
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from florence_onnx._version import __version__
from florence_onnx.bench_fal.agreement import NORMALISATION, THRESHOLDS
from florence_onnx.bench_fal.figures import AgreementRow, Rates, Row
from florence_onnx.bench_fal.journal import Finished

_MAX_ERRORS = 20
"""Most errors to list; the journal has all of them."""

FAIRNESS = (
    "Every target gets the same arguments; a local image is the same `data:` URI for all of them. URLs are passed on, "
    "and their download by the target is part of its time.",
    "Targets take turns round by round. Calls are made one at a time, and each is a single HTTP request: no time includes "
    "a retry or a wait for the rate limit.",
    "Times are measured by the caller: those of fal include the network, those of a server on the same machine do not.",
    "A call is cold if it is the first to its target in a process: in process it includes loading the model, over HTTP "
    "the connection. Whether fal's runner was cold is not visible from outside.",
    "Prices are mean warm seconds x price per second. For fal this is an upper bound, because it bills compute and not the "
    "network; for our machine it is the price of one call at a time, without idle time.",
    "fal and this package draw an annotated image for tasks with geometry, and a server does unless it runs with "
    "`--images none`. The times include drawing.",
    "In process, image features are not cached: every time includes the vision encoder. A server caches them unless it "
    "runs with `--cache-mb 0`; with the cache, only the first call for an image includes the vision encoder. Whether fal "
    "caches anything is unknown.",
    NORMALISATION,
    "Boxes are matched one to one, largest IoU first. Outlines are compared by their bounding boxes and by the IoU of "
    "their union. `any label` ignores the labels. Agreement is not correctness: fal is the reference, not the ground truth. "
    "Whether fal applies the EXIF orientation is unknown: use images without one.",
)


@dataclass(frozen=True)
class Result:
    """All results of one comparison."""

    settings: dict[str, Any]
    """The options of the command."""
    rates: Rates
    timing: list[Row]
    agreement: list[AgreementRow]
    errors: list[tuple[str, Finished]]
    """Name of the target and last attempt, for each call that failed."""
    stopped: dict[str, str]
    """Targets (by name) that were skipped before the end, and the reasons."""
    num_sent: int
    """Requests sent to fal by all processes."""
    num_missing: int
    """Calls that have no answer."""


def to_json(result: Result) -> dict[str, Any]:
    """Returns the report as JSON."""
    return {
        "format": 1,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "version": __version__,
        "settings": result.settings,
        "rates": {"fal_dollars_per_second": result.rates.fal, "own_dollars_per_hour": result.rates.own},
        "num_sent_to_fal": result.num_sent,
        "num_missing": result.num_missing,
        "stopped": result.stopped,
        "timing": [dataclasses.asdict(row) for row in result.timing],
        "agreement": [dataclasses.asdict(row) for row in result.agreement],
        "errors": [
            {"target": name, "call": each.call, "image": each.image, "status": each.status, "error": each.error}
            for name, each in result.errors
        ],
        "remarks": list(FAIRNESS),
    }


def write(result: Result, folder: Path) -> None:
    """Writes `report.md` and `report.json`."""
    text = json.dumps(to_json(result), indent=1, ensure_ascii=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    (folder / "report.md").write_text(markdown(result), encoding="utf-8")


def print_to(console: Console, result: Result) -> None:
    """Prints the tables and the problems."""
    for table in tables(result):
        console.print(table)
    for line in _problems(result):
        console.print(Text(line))


def markdown(result: Result) -> str:
    """Returns the report as a Markdown document, with the remarks on fairness."""
    parts = ["# fal and florence-onnx compared", _summary(result)]
    parts += [f"## {table.title}\n\n{_render(table)}" for table in tables(result)]
    if problems := _problems(result):
        parts.append("## Problems\n\n" + "\n".join(problems))
    parts.append("## Remarks\n\n" + "\n".join(f"- {remark}" for remark in FAIRNESS))
    return "\n\n".join(parts) + "\n"


def tables(result: Result) -> list[Table]:
    """Returns the table of times and prices, and that of the agreement if there are two targets."""
    return [_times(result), *([_agreement(result)] if result.agreement else [])]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=Text(title), box=box.MARKDOWN, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold", no_wrap=index < 2)
    return table


def _times(result: Result) -> Table:
    columns = ("planned", "answered", "failed", "cold s", "warm", "p50 s", "p95 s", "$ / 1000", "fal $ / ours")
    table = _table("Times and prices", "target", "task", *columns, "fal p50 / ours", "repeatable")
    for row in result.timing:
        counts = map(str, (row.num_planned, row.num_answered, row.num_failed))
        cold = ", ".join(f"{seconds:.3f}" for seconds in row.cold)
        times = (_show(row.p50, ".3f"), _show(row.p95, ".3f"), _show(row.price_per_1000, ".4g"))
        ratios = (_show(row.price_ratio, ".3g"), _show(row.speed_ratio, ".3g"), _show(row.repeatable, ".0%"))
        cells = (row.target, row.task, *counts, cold, str(row.num_warm), *times, *ratios)
        table.add_row(*map(Text, cells))
    return table


def _agreement(result: Result) -> Table:
    f1 = [f"F1@{threshold}" for threshold in THRESHOLDS]
    blind = [f"any label @{threshold}" for threshold in THRESHOLDS]
    columns = ("answers", "unreadable", "boxes", *f1, *blind, "mask IoU", "text", "equal")
    table = _table(f"Agreement with {result.agreement[0].reference}", "target", "task", *columns)
    for row in result.agreement:
        each = row.agreement
        counts = (str(each.num_answers), str(row.num_unreadable), f"{each.num_found}/{each.num_reference}")
        shares = [*each.f1.values(), *each.f1_blind.values(), each.mask_iou, each.text_similarity]
        cells = (row.target, row.task, *counts, *(_show(share, ".3f") for share in shares), _show(each.equal, ".0%"))
        table.add_row(*map(Text, cells))
    return table


def _show(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _render(table: Table) -> str:
    table.title = None
    buffer = io.StringIO()
    Console(file=buffer, width=10_000, color_system=None).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().strip().splitlines())


def _summary(result: Result) -> str:
    settings = result.settings
    return (
        f"{len(settings['images'])} images x {len(settings['tasks'])} tasks x {settings['repeats']} repeats; targets "
        f"{', '.join(settings['targets'].values())}. Calls sent to fal so far: {result.num_sent}. Rates: "
        f"${result.rates.fal:g} per second at fal, ${result.rates.own:g} per hour for our machine. florence-onnx {__version__}."
    )


def _problems(result: Result) -> list[str]:
    lines = [f"- {name} was skipped: {reason}" for name, reason in result.stopped.items()]
    for name, each in result.errors[:_MAX_ERRORS]:
        lines.append(f"- {name}, {each.task} of {each.image}: {each.status or 'no answer'}: {_one_line(each.error)}")
    if len(result.errors) > _MAX_ERRORS:
        lines.append(f"- and {len(result.errors) - _MAX_ERRORS} more errors, in the journal")
    if result.num_missing:
        lines.append(
            f"- {result.num_missing} calls have no answer; run the same command again to repeat those that can succeed"
        )
    return lines


def _one_line(text: str | None, limit: int = 300) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
