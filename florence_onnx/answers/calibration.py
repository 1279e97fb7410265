"""From scores to probabilities: what share of the boxes with such a score are right.

A `score` ranks boxes well, but 0.9 does not mean that nine of ten are right. `florence-onnx evaluate` fits a calibration on
images whose contents are known, writes it to a file, and `Florence2.from_pretrained(…, calibration=FILE)` applies it to
`score`; the parts of a score (`score_parts`) stay as the model has them.

The curve is the beta calibration of Kull, Silva Filho and Flach (2017), p = 1 / (1 + exp(-(a ln s - b ln(1 - s) + c))), with a
and b not negative: it only grows, so the order of the boxes and with it the average precision stay what they are.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from florence_onnx.errors import InputError

CalibrationFiles: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]]"
FORMAT = "florence_onnx calibration"
VERSION = 1
EPSILON = 1e-6
"""Scores are kept this far from 0 and 1, where the curve has no value."""


@dataclass(frozen=True)
class Calibration:
    """The curve of one task of one model.

    Raises:
        InputError: A number is out of range.
    """

    task: str
    """Slug of the task whose boxes it was fitted on."""
    a: float
    b: float
    c: float
    num_boxes: int
    """Boxes that it was fitted on."""
    num_images: int
    model: str | None = None
    """Digest of the model's files (`Bundle.digest`); None where they have none, so that any model may use it."""

    def __post_init__(self) -> None:
        for name in ("a", "b", "c"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise InputError(f"{name} must be a number, got {value!r}")
            if name != "c" and value < 0:
                raise InputError(f"{name} must not be negative, since the curve would fall, got {value!r}")
        if not isinstance(self.task, str) or not isinstance(self.model, str | None):
            raise InputError("task must be the slug of a task, and model a digest or null")

    def apply(self, score: float) -> float:
        """The probability that a box with a score is right, above 0 and below 1."""
        kept = min(max(score, EPSILON), 1 - EPSILON)
        value = self.a * math.log(kept) - self.b * math.log1p(-kept) + self.c
        return 1 / (1 + math.exp(-value)) if value >= 0 else math.exp(value) / (1 + math.exp(value))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that `from_pretrained` takes, in place of one that is there.

        Raises:
            InputError: It cannot be written.
        """
        content = {"format": FORMAT, "version": VERSION, "method": "beta", **vars(self)}
        target = Path(path)
        part = target.with_name(target.name + ".part")
        try:
            part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            part.replace(target)
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror or error}") from error


def read(path: str | os.PathLike[str]) -> Calibration:
    """Reads a file that `Calibration.write` has written.

    Raises:
        InputError: It cannot be read, or is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as a calibration ({error}); {_HOW}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path} is no calibration of florence_onnx; {_HOW}")
    if content.get("version") != VERSION or content.get("method") != "beta":
        raise InputError(
            f"{path} is a calibration of version {content.get('version')!r}, method {content.get('method')!r}; this "
            f"florence_onnx reads version {VERSION}, method 'beta': {_HOW}"
        )
    try:
        return Calibration(**{name: content[name] for name in Calibration.__dataclass_fields__})
    except (KeyError, InputError) as error:
        raise InputError(f"{path} is incomplete or damaged ({error}); {_HOW}") from error


_HOW = "fit one with: florence-onnx evaluate --coco … --write-calibration FILE"


def paths_of(files: CalibrationFiles | None) -> tuple[str, ...]:
    """The absolute paths of one file, or of several, so that a process in another folder finds them."""
    found: list[Any] = [] if files is None else [files] if isinstance(files, str | os.PathLike) else list(files)
    return tuple(str(Path(each).resolve()) for each in found)


def read_all(paths: Sequence[str], model: str | None) -> dict[str, Calibration]:
    """Reads the calibrations of a model.

    Args:
        paths: Files, one a task.
        model: Digest of the model's files; None where they have none.

    Returns:
        The calibrations by the slugs of their tasks.

    Raises:
        InputError: As for `read`; or one was fitted for another model, or two for one task.
    """
    found: dict[str, Calibration] = {}
    for path in paths:
        each = read(path)
        if each.task in found:
            raise InputError(f"{path} is the second calibration for {each.task}; give one a task")
        if each.model is not None and model is not None and each.model != model:
            raise InputError(
                f"{path} was fitted for another model (digest {each.model[:12]}…, this one's is {model[:12]}…), and scores "
                f"differ between models and precisions; {_HOW}"
            )
        found[each.task] = each
    return found
