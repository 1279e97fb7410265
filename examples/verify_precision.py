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

from florence_onnx import EncodedImage, Florence2, tasks
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


def compare(
    reference: Florence2, candidate: Florence2, task: Task[object], images: list[tuple[EncodedImage, EncodedImage]]
) -> Agreement:
    """Runs a task with both models on all images.

    Args:
        reference: The model whose answers are taken to be right.
        candidate: The model to check.
        task: A task that needs neither text nor region.
        images: At least one image, each as encoded by the reference and by the candidate.
    """
    num_equal, differences, same_top = 0, [], []
    for for_reference, for_candidate in images:
        expected = reference.run(task, for_reference)
        num_equal += candidate.run(task, for_candidate).token_ids == expected.token_ids
        logits = reference.score_tokens(task, for_reference, expected.token_ids)  # (L - 1, V)
        others = candidate.score_tokens(task, for_candidate, expected.token_ids)
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
    paths = sorted(path for path in arguments.images.iterdir() if path.suffix.lower() in {".jpeg", ".jpg", ".png"})
    if not paths:
        parser.error(f"{arguments.images} has no images")

    reference = Florence2.from_pretrained(arguments.reference)
    candidate = Florence2.from_pretrained(arguments.model)
    images = [(reference.encode(path), candidate.encode(path)) for path in paths]
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
