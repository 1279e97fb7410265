"""Reliability as a plot."""

from __future__ import annotations

import os
from collections.abc import Mapping

from florence_onnx.errors import InputError, MissingExtraError
from florence_onnx.evaluating.calibrating import Reliability


def plot(reliabilities: Mapping[str, Reliability], path: str | os.PathLike[str]) -> None:
    """Draws the share of right boxes over the score, and how many boxes have such a score.

    Args:
        reliabilities: By the title of their part of the plot.
        path: A `.png`, `.svg` or `.pdf` file.

    Raises:
        InputError: The file cannot be written, or its name ends otherwise.
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "evaluate") from error
    figure = Figure(figsize=(4.2 * len(reliabilities), 4.4), layout="constrained")
    for axes, (title, each) in zip(
        figure.subplots(1, len(reliabilities), squeeze=False)[0], reliabilities.items(), strict=True
    ):
        widths = [part.high - part.low for part in each.bins]
        axes.bar(
            [part.low for part in each.bins],
            [part.share_right for part in each.bins],
            widths,
            align="edge",
            color="#5b8def",
            edgecolor="white",
            label="share right",
        )
        axes.plot([0, 1], [0, 1], color="#444444", linestyle="--", linewidth=1, label="as it should be")
        axes.plot(
            [part.mean_score for part in each.bins],
            [part.share_right for part in each.bins],
            "o",
            color="#c2410c",
            markersize=4,
            label="at the mean score",
        )
        for part in each.bins:
            axes.annotate(str(part.count), ((part.low + part.high) / 2, 0.01), ha="center", fontsize=7, color="#222222")
        axes.set(
            xlim=(0, 1),
            ylim=(0, 1.02),
            xlabel="score",
            ylabel="share of boxes that are right",
            title=f"{title}: ECE {each.ece:.3f}, {each.count} boxes",
        )
        axes.legend(loc="upper left", fontsize=8)
    try:
        figure.savefig(os.fspath(path), dpi=110)
    except (OSError, ValueError) as error:
        raise InputError(f"{os.fspath(path)} cannot be written: {error}") from error
