"""`python -m benchmarks.cpu.chart RESULT.json OUT.svg`: latency by stage, peers side by side, greedy and beams."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.cpu.bars import value
from benchmarks.cpu.peers import REFERENCE

Result = Mapping[str, Any]

_PARTS = (
    ("preprocess", "preprocess", "#9aa0a6"),
    ("vision", "vision encoder", "#3b6fb6"),
    ("first_tokens", "text encoder, first two tokens", "#e8a33d"),
    ("rest", "remaining tokens", "#4fa36c"),
)
"""Stage, legend, colour. The colours differ in lightness too, for colour-blind readers."""
_INK, _PAPER, _OWN = "#1f2328", "#ffffff", "#0b5cad"


def draw(result: Result) -> Figure:
    """Draws the chart of a result, on an opaque background, so that it is legible on a dark page."""
    names = _order(result)
    figure = Figure(figsize=(12, 2.2 + 0.42 * len(names)), facecolor=_PAPER, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    workload = result["workload"]
    _panel(left, result, names, "greedy", "greedy")
    _panel(right, result, names, "beams", f"{workload['num_beams']} beams")
    left.set_yticks(range(len(names)), [_label(result, name) for name in names])
    for label, name in zip(left.get_yticklabels(), names, strict=True):
        if name.startswith("ours-"):
            label.set(color=_OWN, fontweight="bold")
    left.invert_yaxis()
    title = (
        f"{result['model']['name']}: one image to {workload['num_tokens']} tokens, seconds (shorter is better)\n"
        f"{result['machine']['cpu']}, {workload['threads']} threads; same weights, image, prompt and number of tokens"
    )
    figure.suptitle(title, color=_INK, fontsize=11)
    patches = [Patch(color=colour, label=text) for _, text, colour in _PARTS]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(_PARTS), frameon=False, labelcolor=_INK)
    return figure


def _order(result: Result) -> list[str]:
    """Returns the names of the peers, slowest first."""
    return sorted(result["peers"], key=lambda name: -(value(result, name, "end_to_end_greedy") or 0))


def _label(result: Result, name: str) -> str:
    title: str = result["peers"][name]["title"]
    return title.replace("plain ONNX (four graphs), ONNX Runtime", "plain ONNX, ONNX Runtime").replace(
        ", static cache, torch.compile", ", torch.compile"
    )


def parts(result: Result, name: str, search: str) -> list[float] | None:
    """Returns the median seconds of the stacked parts; None if the peer has no such search."""
    preprocess, vision, first, answer = (
        value(result, name, stage) for stage in ("preprocess", "vision", f"first_tokens_{search}", f"answer_{search}")
    )
    if preprocess is None or vision is None or first is None or answer is None:
        return None
    return [preprocess, vision, first, max(answer - first, 0.0)]


def _panel(axes: Axes, result: Result, names: Sequence[str], search: str, title: str) -> None:
    longest = max(value(result, name, f"end_to_end_{each}") or 0 for name in names for each in ("greedy", "beams"))
    for row, name in enumerate(names):
        seconds = parts(result, name, search)
        if seconds is None:
            axes.text(longest * 0.01, row, "no beam search", va="center", color="#6e7781", fontsize=9, style="italic")
            continue
        start = 0.0
        for length, (_, _, colour) in zip(seconds, _PARTS, strict=True):
            axes.barh(row, length, left=start, height=0.68, color=colour, edgecolor=_PAPER, linewidth=0.6)
            start += length
        _annotate(axes, result, name, search, row, start + longest * 0.012)
    axes.set_title(title, color=_INK, fontsize=11, fontweight="bold")
    axes.set_xlim(0, longest * 1.24)
    axes.set_facecolor(_PAPER)
    axes.tick_params(colors=_INK, length=0)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[:].set_visible(False)


def _annotate(axes: Axes, result: Result, name: str, search: str, row: int, place: float) -> None:
    total, reference = (value(result, each, f"end_to_end_{search}") for each in (name, REFERENCE))
    if total is None:
        return
    factor = f"  ({reference / total:.1f}×)" if reference and name != REFERENCE else ""
    behind = {"facecolor": _PAPER, "edgecolor": "none", "pad": 0.8}  # hides the grid line behind the figure
    axes.text(place, row, f"{total:.2f} s{factor}", va="center", color=_INK, fontsize=9, bbox=behind)


def main(
    result: Annotated[Path, typer.Argument(help="A .json of benchmarks/results.", exists=True)],
    output: Annotated[Path, typer.Argument(help="The .svg or .png to write.")],
) -> None:
    """Draws the chart of one result."""
    figure = draw(json.loads(result.read_text(encoding="utf-8")))
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)


if __name__ == "__main__":
    typer.run(main)
