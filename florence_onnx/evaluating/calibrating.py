"""Fits a calibration, and measures how reliable scores are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florence_onnx.answers.calibration import EPSILON
from florence_onnx.errors import InputError

Floats = npt.NDArray[np.float64]
NUM_BINS = 10
LEAST_BOXES = 20
"""Fewer boxes say too little for a curve with three parameters."""
_RIDGE = 1e-3
"""Weight of a penalty on the parameters: without one they have no limit where a score tells right from wrong exactly."""


@dataclass(frozen=True)
class Bin:
    """The boxes whose scores are in a tenth of 0 to 1."""

    low: float
    high: float
    count: int
    mean_score: float
    share_right: float


@dataclass(frozen=True)
class Reliability:
    """How far scores are from being the share of boxes that are right."""

    ece: float
    """Expected calibration error: the mean distance between the two over ten equally wide bins, weighted by their boxes."""
    bins: tuple[Bin, ...]
    """Those that have boxes."""
    count: int


def measure_reliability(scores: Sequence[float], is_right: Sequence[bool]) -> Reliability:
    """Measures the reliability of scores.

    Args:
        scores: From 0 to 1.
        is_right: For each whether its box is right.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(is_right, dtype=np.float64)
    places = np.minimum((values * NUM_BINS).astype(int), NUM_BINS - 1)
    bins = []
    for place in range(NUM_BINS):
        here = places == place
        if here.any():
            means = float(values[here].mean()), float(right[here].mean())
            bins.append(Bin(place / NUM_BINS, (place + 1) / NUM_BINS, int(here.sum()), *means))
    distances = sum(each.count * abs(each.mean_score - each.share_right) for each in bins)
    return Reliability(distances / len(values) if len(values) else 0.0, tuple(bins), len(values))


def fit(scores: Sequence[float], is_right: Sequence[bool]) -> tuple[float, float, float]:
    """Fits a, b and c of `florence_onnx.answers.calibration` by maximum likelihood.

    Args:
        scores: From 0 to 1.
        is_right: For each whether its box is right.

    Raises:
        InputError: There are too few boxes, or all are right, or all are wrong.
    """
    right = np.asarray(is_right, dtype=np.float64)
    if len(right) < LEAST_BOXES or not 0 < right.sum() < len(right):
        raise InputError(
            f"a calibration needs at least {LEAST_BOXES} boxes, some right and some wrong; there are {len(right)}, of which "
            f"{int(right.sum())} are right: give more images"
        )
    kept = np.clip(np.asarray(scores, dtype=np.float64), EPSILON, 1 - EPSILON)
    columns = np.stack([np.log(kept), -np.log1p(-kept)], axis=1)
    used = [0, 1]
    while True:  # a negative parameter is left out, as in the paper
        found = _logistic(columns[:, used], right)
        negative = [place for place, value in zip(used, found, strict=False) if value < 0]
        if not negative:
            break
        used = [place for place in used if place not in negative[:1]]
    parameters = dict(zip(used, found, strict=False))
    return float(parameters.get(0, 0.0)), float(parameters.get(1, 0.0)), float(found[-1])


def _logistic(columns: Floats, right: Floats) -> Floats:
    """Logistic regression by Newton's method; the last parameter is the constant."""
    # Platt's targets: not quite 0 and 1, so that few boxes do not make a step of the curve
    positives, negatives = right.sum(), len(right) - right.sum()
    targets = np.where(right > 0, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    design = np.concatenate([columns, np.ones((len(columns), 1))], axis=1)
    penalty = np.diag([_RIDGE] * columns.shape[1] + [0.0])
    parameters = np.zeros(design.shape[1])
    for _ in range(100):
        probabilities = 1 / (1 + np.exp(-np.clip(design @ parameters, -50, 50)))
        gradient = design.T @ (probabilities - targets) + penalty @ parameters
        weights = np.maximum(probabilities * (1 - probabilities), 1e-9)
        step = np.linalg.solve(
            (design * weights[:, None]).T @ design + penalty + 1e-9 * np.eye(len(gradient)), gradient
        )
        parameters -= step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-8:
            break
    return parameters
