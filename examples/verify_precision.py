"""Compares a bundle with a reference bundle on your images, without PyTorch: the same tokens, and how far the logits are.

    python examples/verify_precision.py OUT/int8 --reference OUT/fp32 --images photos/ --min-equal 0.9

Both answer each task on each image. The logits are compared while both are fed the reference's answer, so that one
different token does not make the rest incomparable. `florence-onnx-export verify` measures more: boxes, masks, texts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from florence_onnx import Florence2, tasks
from florence_onnx.tasks import Task

TASKS = ("caption", "object-detection", "ocr-with-region")


@dataclass(frozen=True)
class Agreement:
    """How much two models agree on one task."""

    num_answers: int
    """Images that were compared."""
    num_equal: int
    """Images with the same tokens."""
    max_difference: float
    """Largest absolute difference of a logit."""
    top_1: float
    """Share of positions where both models have the same most likely token."""


def compare(reference: Florence2, candidate: Florence2, task: Task[object], images: list[Path]) -> Agreement:
    """Runs a task with both models on all images; at least one image."""
    num_equal, differences, same_top = 0, [], []
    for path in images:
        expected = reference.run(task, path)
        num_equal += candidate.run(task, path).token_ids == expected.token_ids
        logits = reference.score_tokens(task, path, expected.token_ids)  # (L - 1, V)
        others = candidate.score_tokens(task, path, expected.token_ids)
        differences.append(float(np.abs(logits - others).max()))
        same_top.append(logits.argmax(axis=1) == others.argmax(axis=1))
    return Agreement(len(images), num_equal, max(differences), float(np.concatenate(same_top).mean()))


def main() -> int:
    """Reads the arguments, prints a line per task, and returns the exit code: 1 if a task is below `--min-equal`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="bundle to check (%(default)s)")
    parser.add_argument("--reference", default="demo", help="bundle to compare it with, best in fp32 (%(default)s)")
    parser.add_argument("--images", type=Path, required=True, help="folder with png and jpg images")
    parser.add_argument("--min-equal", type=float, default=0.0, help="lowest share of equal answers (%(default)s)")
    arguments = parser.parse_args()
    images = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in {".jpeg", ".jpg", ".png"})
    if not images:
        parser.error(f"{arguments.images} has no images")

    reference = Florence2.from_pretrained(arguments.reference)
    candidate = Florence2.from_pretrained(arguments.model)
    is_below = False
    print(f"{'task':20} {'equal':>9} {'logits max abs':>15} {'top-1':>7}")
    for slug in TASKS:
        agreement = compare(reference, candidate, tasks.get(slug), images)
        equal = f"{agreement.num_equal}/{agreement.num_answers}"
        print(f"{slug:20} {equal:>9} {agreement.max_difference:15.2g} {agreement.top_1:7.3f}")
        is_below |= agreement.num_equal < arguments.min_equal * agreement.num_answers
    return 1 if is_below else 0


if __name__ == "__main__":
    sys.exit(main())
