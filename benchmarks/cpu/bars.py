"""The project's performance targets (bars) on a CPU, and whether a result reaches them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.cpu.peers import REFERENCE

Result = Mapping[str, Any]
EXACT = "ours-fp32"
DEFAULT = "default"
"""Stands for the peer with the precision that a user gets on this machine."""
BF16 = "transformers-bf16"
OPENVINO = "openvino-bf16"


@dataclass(frozen=True)
class Bar:
    """A target: a ratio between two figures, and its limit."""

    text: str
    peer: str
    """`EXACT` or `DEFAULT`."""
    stage: str
    """A stage, `peak_rss` or `cold_start`."""
    rival: str
    """Another peer, or `floor`: the lower bound for the precision of `peer`."""
    limit: float
    kind: Literal["times as fast", "of its time"]
    """`times as fast`: rival / peer is at least the limit. `of its time`: peer / rival is at most the limit."""
    rival_stage: str | None = None
    """The rival's stage, if it is another than `stage`."""


BARS: tuple[Bar, ...] = (
    Bar("fp32 end to end, greedy", EXACT, "end_to_end_greedy", REFERENCE, 1.8, "times as fast"),
    Bar("fp32 end to end, beams", EXACT, "end_to_end_beams", REFERENCE, 2.8, "times as fast"),
    Bar("fp32 vision encoder", EXACT, "vision", REFERENCE, 1.45, "times as fast"),
    Bar("fp32 greedy token against memory", EXACT, "step_greedy", "floor", 1.2, "of its time"),
    Bar("default end to end, greedy", DEFAULT, "end_to_end_greedy", REFERENCE, 4.5, "times as fast"),
    Bar("default end to end, greedy", DEFAULT, "end_to_end_greedy", BF16, 2.7, "times as fast"),
    Bar("default end to end, beams", DEFAULT, "end_to_end_beams", REFERENCE, 5.5, "times as fast"),
    Bar("default end to end, beams", DEFAULT, "end_to_end_beams", BF16, 2.8, "times as fast"),
    Bar("default end to end, greedy", DEFAULT, "end_to_end_greedy", OPENVINO, 1.5, "times as fast"),
    Bar("default end to end, beams", DEFAULT, "end_to_end_beams", OPENVINO, 1.5, "times as fast"),
    Bar("default vision encoder", DEFAULT, "vision", OPENVINO, 0.7, "of its time"),
    Bar("default greedy token", DEFAULT, "step_greedy", BF16, 0.17, "of its time"),
    Bar(
        "second task against the first",
        DEFAULT,
        "second_task",
        DEFAULT,
        0.2,
        "of its time",
        rival_stage="end_to_end_greedy",
    ),
    Bar("peak memory", DEFAULT, "peak_rss", BF16, 0.6, "of its time"),
    Bar("cold start", DEFAULT, "cold_start", REFERENCE, 0.4, "of its time"),
)


def evaluate(result: Result, default: str | None) -> list[dict[str, Any]]:
    """Evaluates every bar on a result.

    Args:
        result: What `compare` writes; only `peers`, `absent`, `floor` and `checks` are read.
        default: Name of the peer that `DEFAULT` stands for.

    Returns:
        For each bar `text`, `peer`, `rival`, `limit`, `kind`, `ratio` (of medians), `ratio_of_minima`, `ratio_at_floor`
        (the ratio if the peer took no longer than its floor; None if there is none) and `status`: `hit`, `miss`, or
        `not measured` with a `reason`.
    """
    return [_exactness(result), *(_evaluate(bar, result, default) for bar in BARS)]


def _exactness(result: Result) -> dict[str, Any]:
    row: dict[str, Any] = {
        "text": "fp32 tokens equal",
        "peer": EXACT,
        "rival": REFERENCE,
        "limit": 1.0,
        "kind": "equal",
    }
    agreement = result["peers"].get(EXACT, {}).get("agreement")
    if not agreement:
        reason = _reason(result, EXACT) if EXACT not in result["peers"] else _reason(result, REFERENCE)
        return {**row, "status": "not measured", "reason": reason}
    ratio = min(agreement.values())
    return {**row, "ratio": ratio, "ratio_of_minima": ratio, "status": "hit" if ratio == 1 else "miss"}


def _evaluate(bar: Bar, result: Result, default: str | None) -> dict[str, Any]:
    peer, rival = (str(default) if name == DEFAULT else name for name in (bar.peer, bar.rival))
    row: dict[str, Any] = {"text": bar.text, "peer": peer, "rival": rival, "limit": bar.limit, "kind": bar.kind}
    if default is None and bar.peer == DEFAULT:
        return {**row, "peer": DEFAULT, "status": "not measured", "reason": "none of ours was measured"}
    ratios = {}
    for statistic in ("median", "min"):
        ours = value(result, peer, bar.stage, statistic)
        theirs = _rival_value(bar, result, peer, rival, statistic)
        if ours is None or theirs is None:
            return {**row, "status": "not measured", "reason": _reason(result, peer if ours is None else rival)}
        ratios[statistic] = _ratio(bar, ours, theirs)
    is_hit = ratios["median"] >= bar.limit if bar.kind == "times as fast" else ratios["median"] <= bar.limit
    status = "hit" if is_hit else "miss"
    found = {"ratio": ratios["median"], "ratio_of_minima": ratios["min"], "status": status}
    return {**row, **found, "ratio_at_floor": _ratio_at_floor(bar, result, peer, rival)}


def _ratio(bar: Bar, ours: float, theirs: float) -> float:
    return theirs / ours if bar.kind == "times as fast" else ours / theirs


def _ratio_at_floor(bar: Bar, result: Result, peer: str, rival: str) -> float | None:
    """Returns the ratio if our peer took no longer than its floor, and the rival as long as measured."""
    ours = _floor(result, peer, bar.stage)
    theirs = _rival_value(bar, result, peer, rival, "median")
    if bar.rival == DEFAULT:
        theirs = _floor(result, peer, bar.rival_stage or bar.stage)
    return None if ours is None or theirs is None else _ratio(bar, ours, theirs)


def _floor(result: Result, peer: str, stage: str) -> float | None:
    precision = result["peers"].get(peer, {}).get("precision")
    floor: float | None = result.get("floor", {}).get("stages", {}).get(precision, {}).get(stage)
    return floor


def _rival_value(bar: Bar, result: Result, peer: str, rival: str, statistic: str) -> float | None:
    if rival != "floor":
        return value(result, rival, bar.rival_stage or bar.stage, statistic)
    return _floor(result, peer, bar.stage)


def value(result: Result, peer: str, stage: str, statistic: str = "median") -> float | None:
    """Returns a figure of a result in seconds or bytes; None if it was not measured."""
    measured = result["peers"].get(peer, {})
    found = measured.get(stage) if stage in ("peak_rss", "cold_start") else measured.get("stages", {}).get(stage)
    return None if not found else float(found[statistic])


def _reason(result: Result, name: str) -> str:
    return f"{name}: {result.get('absent', {}).get(name, 'not measured')}"
