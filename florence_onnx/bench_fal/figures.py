"""Times, prices and agreement of a comparison, computed from the journal."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from florence_onnx.bench_fal import agreement
from florence_onnx.bench_fal.journal import Finished, Journal
from florence_onnx.bench_fal.plan import Call
from florence_onnx.bench_fal.targets import FAL, Target

ALL = "all"
"""Task name of the rows over all tasks."""


@dataclass(frozen=True)
class Rates:
    """Prices of time."""

    fal: float
    """Dollars per second of compute at fal."""
    own: float
    """Dollars per hour of the machine that this package runs on."""

    def per_second(self, target: str) -> float:
        """Returns the dollars per second of a target, by its name."""
        return self.fal if target == FAL else self.own / 3600


@dataclass(frozen=True)
class Row:
    """The results of one target in one task. Times are in seconds, as seen by the caller; None if not measured."""

    target: str
    task: str
    num_planned: int
    num_answered: int
    num_failed: int
    """Calls whose last attempt ended with an error."""
    cold: list[float]
    """Seconds of the first successful call of each process."""
    num_warm: int
    """Successful calls that are not cold."""
    p50: float | None
    p95: float | None
    """95th percentile of the warm calls, linearly interpolated."""
    mean: float | None
    """Mean of the warm calls."""
    price_per_1000: float | None
    """Dollars for 1000 calls: mean warm seconds x price per second x 1000, for calls one at a time."""
    repeatable: float | None
    """Share of the repeats whose answer equals the first answer to the same question, 0 to 1."""
    price_ratio: float | None = None
    """Price at fal / price at this target."""
    speed_ratio: float | None = None
    """p50 of fal / p50 of this target."""
    billable_units: float | None = None
    """Mean of the header `x-fal-billable-units`; None unless every response has it."""


@dataclass(frozen=True)
class AgreementRow:
    """The agreement of one target with the reference in one task."""

    reference: str
    target: str
    task: str
    num_unreadable: int
    """Pairs that could not be compared because one answer is not in fal's format."""
    agreement: agreement.Agreement


def timing_rows(plan: Sequence[Call], targets: Sequence[Target], journal: Journal, rates: Rates) -> list[Row]:
    """Returns a row for each target and task, and one over all tasks if there are several."""
    slugs = _slugs(plan)
    rows = [
        _row(target, slug, [call for call in plan if slug in (ALL, call.task.slug)], journal, rates)
        for target in targets
        for slug in slugs
    ]
    # prices and times of fal are the reference of the ratios, where fal is a target
    at_fal = {row.task: row for row in rows if row.target == FAL}
    return [_with_ratios(row, at_fal[row.task]) if row.task in at_fal and row.target != FAL else row for row in rows]


def _slugs(plan: Sequence[Call]) -> list[str]:
    slugs = list(dict.fromkeys(call.task.slug for call in plan))
    return [*slugs, ALL] if len(slugs) > 1 else slugs


def _row(target: Target, slug: str, calls: Sequence[Call], journal: Journal, rates: Rates) -> Row:
    found = [each for call in calls if (each := journal.find(call, target.identity)) is not None]
    answered = [each for each in found if each.error is None]
    warm = [each.seconds for each in answered if not each.is_cold]
    mean = float(np.mean(warm)) if warm else None
    return Row(
        target=target.name,
        task=slug,
        num_planned=len(calls),
        num_answered=len(answered),
        num_failed=len(found) - len(answered),
        cold=[each.seconds for each in answered if each.is_cold],
        num_warm=len(warm),
        p50=float(np.percentile(warm, 50)) if warm else None,
        p95=float(np.percentile(warm, 95)) if warm else None,
        mean=mean,
        price_per_1000=None if mean is None else mean * rates.per_second(target.name) * 1000,
        repeatable=_repeatable(target, calls, journal),
        billable_units=_billable_units(answered),
    )


def _with_ratios(row: Row, fal: Row) -> Row:
    return dataclasses.replace(
        row,
        price_ratio=_quotient(fal.price_per_1000, row.price_per_1000),
        speed_ratio=_quotient(fal.p50, row.p50),
    )


def _quotient(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def _billable_units(answered: Sequence[Finished]) -> float | None:
    try:
        units = [float(each.headers["x-fal-billable-units"]) for each in answered]
    except (KeyError, ValueError):
        return None
    return float(np.mean(units)) if units else None


def _repeatable(target: Target, calls: Sequence[Call], journal: Journal) -> float | None:
    equal = []
    for answers in _answers_by_question(target, calls, journal).values():
        read = [agreement.read_answer(raw) or raw for raw in answers]
        equal += [each == read[0] for each in read[1:]]
    return float(np.mean(equal)) if equal else None


def _answers_by_question(target: Target, calls: Sequence[Call], journal: Journal) -> dict[str, list[Any]]:
    """Returns the raw answers to each question, in the order of the repeats."""
    found: dict[str, list[Any]] = {}
    for call in calls:
        finished = journal.find(call, target.identity)
        if finished is not None and finished.error is None:
            found.setdefault(call.question, []).append(finished.answer)
    return found


def agreement_rows(plan: Sequence[Call], targets: Sequence[Target], journal: Journal) -> list[AgreementRow]:
    """Compares the first answers of every target with those of fal, or of the first target if fal is none of them."""
    if len(targets) < 2:
        return []
    reference = next((target for target in targets if target.name == FAL), targets[0])
    expected = _answers_by_question(reference, plan, journal)
    rows = []
    for target, slug in itertools.product(targets, _slugs(plan)):
        if target is reference:
            continue
        calls = [call for call in plan if slug in (ALL, call.task.slug)]
        found = _answers_by_question(target, calls, journal)
        pairs = [(expected[question][0], answers[0]) for question, answers in found.items() if question in expected]
        rows.append(_agreement_row(reference.name, target.name, slug, pairs))
    return rows


def _agreement_row(reference: str, target: str, slug: str, pairs: Sequence[tuple[Any, Any]]) -> AgreementRow:
    comparisons, num_unreadable = [], 0
    for raw_expected, raw in pairs:
        expected, answer = agreement.read_answer(raw_expected), agreement.read_answer(raw)
        if expected is None or answer is None:
            num_unreadable += 1
        else:
            comparisons.append(agreement.compare(expected, answer))
    return AgreementRow(reference, target, slug, num_unreadable, agreement.summarise(comparisons))
