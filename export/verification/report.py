"""Agreement as tables for people and JSON for machines, and whether it clears the bars that a user sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table

from .agreement import Comparison, Figures, summarise

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
    """One bundle's agreement with the reference, decoded in one way."""

    bundle: str
    """As the user gave it."""
    precision: str
    num_beams: int
    overall: Figures
    tasks: Mapping[str, Figures]
    """By slug."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; a figure that is not finite (logits that are not) is None."""
        return {
            "bundle": self.bundle,
            "precision": self.precision,
            "num_beams": self.num_beams,
            "overall": figures_to_dict(self.overall),
            "tasks": {slug: figures_to_dict(figures) for slug, figures in self.tasks.items()},
        }


@dataclass(frozen=True)
class Bar:
    """What every task must reach."""

    option: str
    """"--min-box-f1"."""
    field: str
    """Of `Figures`."""
    value: float
    is_maximum: bool = False

    def is_cleared(self, figure: float) -> bool:
        """Whether a figure is good enough; NaN, of either side, never is."""
        return figure <= self.value if self.is_maximum else figure >= self.value


def make_agreement(
    bundle: str, precision: str, num_beams: int, by_task: Mapping[str, Sequence[Comparison]]
) -> Agreement:
    """Sums up the comparisons of one bundle and search, which are given by the task's slug."""
    overall = summarise([each for comparisons in by_task.values() for each in comparisons])
    return Agreement(bundle, precision, num_beams, overall, {slug: summarise(found) for slug, found in by_task.items()})


def figures_to_dict(figures: Figures) -> dict[str, Any]:
    """JSON knows no infinity: what is not finite becomes None."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in asdict(figures).items()
    }


def find_failures(agreements: Sequence[Agreement], bars: Sequence[Bar]) -> list[str]:
    """Says which task of which bundle misses which bar, and which bar no task has a figure for."""
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
    """A row per task, and one for all."""
    title = f"{agreement.bundle}: {agreement.precision}, {_search(agreement.num_beams)}"
    table = _table(title, ("task",))
    for slug, figures in agreement.tasks.items():
        table.add_row(slug, *_cells(figures))
    table.add_section()
    table.add_row(OVERALL, *_cells(agreement.overall))
    return table


def bundles_table(agreements: Sequence[Agreement]) -> Table:
    """A row per bundle and search, over all tasks."""
    table = _table(OVERALL, ("bundle", "precision", "search"))
    for each in agreements:
        table.add_row(each.bundle, each.precision, _search(each.num_beams), *_cells(each.overall))
    return table


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
