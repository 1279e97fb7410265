"""Agreement as tables and as JSON, and the bars (thresholds) that a user sets on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from .agreement import Comparison, Figures, summarise
from .answerers import Timing

OVERALL = "all tasks"

COLUMNS = {
    "answers": ("num_answers", "d"),
    "exact": ("exact", ".3f"),
    "tokens\nin place": ("token_agreement", ".3f"),
    "token\nsimilarity": ("token_similarity", ".3f"),
    "text\nsimilarity": ("text_similarity", ".3f"),
    "box F1\nIoU .5": ("box_f1_50", ".3f"),
    "box F1\nIoU .9": ("box_f1_90", ".3f"),
    "shift\nin bins": ("coordinate_shift", ".2f"),
    "mask\nIoU": ("mask_iou", ".3f"),
    "logits\nmax abs": ("logit_max_abs", ".2g"),
    "logits\nmean abs": ("logit_mean_abs", ".2g"),
    "KL\nin nats": ("logit_kl", ".2g"),
    "top-1": ("logit_top1", ".3f"),
}
"""Heading, field of `Figures`, and format of every column."""


@dataclass(frozen=True)
class Agreement:
    """The agreement of one bundle with the reference, with one search."""

    bundle: str
    """The name as the user gave it."""
    precision: str
    num_beams: int
    overall: Figures
    tasks: Mapping[str, Figures]
    """By the task's slug."""
    image_size: tuple[int, int] | None = None
    """`(width, height)` in pixels at which the bundle read the images."""
    timing: Timing | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON; figures that are not finite become None."""
        return {
            "bundle": self.bundle,
            "precision": self.precision,
            "num_beams": self.num_beams,
            "image_size": None if self.image_size is None else list(self.image_size),
            "seconds": None if self.timing is None else asdict(self.timing),
            "overall": figures_to_dict(self.overall),
            "tasks": {slug: figures_to_dict(figures) for slug, figures in self.tasks.items()},
        }


@dataclass(frozen=True)
class Bar:
    """A threshold that every task must reach."""

    option: str
    """The option of the command line, such as `--min-box-f1`."""
    field: str
    """A field of `Figures`."""
    value: float
    """The threshold."""
    is_maximum: bool = False
    """Whether `value` is the largest allowed figure instead of the smallest."""

    def is_cleared(self, figure: float) -> bool:
        """Whether a figure reaches the threshold. A comparison with NaN never does."""
        return figure <= self.value if self.is_maximum else figure >= self.value


def make_agreement(
    bundle: str,
    precision: str,
    num_beams: int,
    by_task: Mapping[str, Sequence[Comparison]],
    *,
    image_size: tuple[int, int] | None = None,
    timing: Timing | None = None,
) -> Agreement:
    """Aggregates the comparisons of one bundle and search, given by the task's slug."""
    overall = summarise([each for comparisons in by_task.values() for each in comparisons])
    figures = {slug: summarise(found) for slug, found in by_task.items()}
    return Agreement(bundle, precision, num_beams, overall, figures, image_size, timing)


def figures_to_dict(figures: Figures) -> dict[str, Any]:
    """Returns a dict for JSON, which has no infinity or NaN: such figures become None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(figures).items()
    }


def find_failures(agreements: Sequence[Agreement], bars: Sequence[Bar]) -> list[str]:
    """Lists every bar that a task of a bundle misses, and every bar for which no task has a figure."""
    found = []
    for agreement in agreements:
        where = f"{agreement.bundle}, beams {agreement.num_beams}"
        for bar in bars:
            figures = {slug: getattr(task, bar.field) for slug, task in agreement.tasks.items()}
            known = {slug: value for slug, value in figures.items() if value is not None}
            if not known:
                found.append(f"{where}: nothing was measured for {bar.option}")
            found += [
                f"{where}, {slug}: {bar.field} is {value:.4g}, {bar.option} is {bar.value:g}"
                for slug, value in known.items()
                if not bar.is_cleared(value)
            ]
    return found


def tasks_table(agreement: Agreement) -> Table:
    """Makes a table with a row per task, and one for all tasks."""
    title = f"{agreement.bundle}: {agreement.precision}, {_search(agreement.num_beams)}"
    table = _table(title, ("task",))
    for slug, figures in agreement.tasks.items():
        table.add_row(slug, *_cells(figures))
    table.add_section()
    table.add_row(OVERALL, *_cells(agreement.overall))
    return table


def bundles_table(agreements: Sequence[Agreement]) -> Table:
    """Makes a table with a row per bundle, image size and search, over all tasks, and the time for an image and an answer."""
    table = _table(OVERALL, ("bundle", "precision", "search", "vision\nin ms", "decoding\nin ms"))
    for each in agreements:
        times = _milliseconds(each.timing)
        table.add_row(each.bundle, each.precision, _search(each.num_beams), *times, *_cells(each.overall))
    return table


def _milliseconds(timing: Timing | None) -> tuple[str, str]:
    if timing is None:
        return "", ""
    return f"{1e3 * timing.vision_seconds:.1f}", f"{1e3 * timing.decoding_seconds:.1f}"


def _table(title: str, first: Sequence[str]) -> Table:
    table = Table(*first, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    return table


def _search(num_beams: int) -> str:
    return "greedy" if num_beams == 1 else f"{num_beams} beams"


def _cells(figures: Figures) -> list[str]:
    values = [(getattr(figures, field), style) for field, style in COLUMNS.values()]
    return ["" if value is None else format(value, style) for value, style in values]
