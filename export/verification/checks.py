"""The checks of every export: each graph against its torch module, then whole answers against transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from florence_onnx import tasks
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import VerificationError
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.images import decoding, preprocessing
from florence_onnx.images.decoding import ImageInput
from florence_onnx.model import Florence2
from florence_onnx.runtime.load_options import LoadOptions

from ..checkpoints.checkpoint import Checkpoint
from ..graphs.comparison import OutputError, compare, worst
from ..graphs.plans import GraphPlan
from . import reference
from .photograph import PHOTOGRAPH

MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 5e-2, "int8": 0.5, "int4": 0.9}
"""Bound on `OutputError.max_rel` of every output of a graph, by precision.

In fp32 another order of the sums changes an output by about 1e-6 of its largest value. In fp16 every value is rounded
by up to 2**-11 (5e-4), layer after layer. In int8 and int4 the errors depend on the weights, and those of random
weights are large, so these two bounds catch broken conversions only; `python -m export verify` measures how good a
conversion is.
"""

EXACT = ("fp32",)
"""Precisions in which every token must equal the checkpoint's. Others may differ where two logits are close."""

SEARCHES = {
    "greedy": GenerationOptions(num_beams=1, max_new_tokens=48),
    "beam-3": GenerationOptions(num_beams=3, max_new_tokens=48),
}
"""The searches that `check_tokens` compares."""
TASKS = (tasks.OBJECT_DETECTION, tasks.DETAILED_CAPTION)
"""The tasks that `check_tokens` compares: location tokens, and text."""


@dataclass(frozen=True)
class TokenAgreement:
    """How many tokens of a bundle's answers equal the checkpoint's at the same position."""

    equal: int
    total: int
    """Tokens of the longer answer of each pair."""

    @property
    def is_exact(self) -> bool:
        """Whether the answers are the same."""
        return self.equal == self.total


def compare_graph(plan: GraphPlan, path: Path) -> dict[str, OutputError]:
    """Compares a graph of any precision with its torch module, on all inputs of its plan.

    Args:
        plan: What the graph was exported from.
        path: The `.onnx` file.

    Returns:
        The largest errors of each output.
    """
    batches = (plan.inputs, *plan.check_inputs)
    return worst(compare(plan.module, path, inputs, plan.outputs) for inputs in batches)


def check_graph(name: str, errors: Mapping[str, OutputError], precision: str) -> dict[str, Any]:
    """Checks the errors of a graph against the bound of its precision.

    Returns:
        The largest `max_abs` and the largest `max_rel` of all outputs.

    Raises:
        VerificationError: An output is beyond `MAX_RELATIVE_ERROR`.
    """
    output, largest = max(errors.items(), key=lambda item: item[1].max_rel)
    # "not <=" instead of ">": an error that is NaN must not pass.
    if not largest.max_rel <= MAX_RELATIVE_ERROR[precision]:
        raise VerificationError(
            f"{name} does not reproduce the checkpoint in {precision}: output {output} is off by {largest.max_abs:.3g}, "
            f"{largest.max_rel:.3g} of its largest value; allowed is {MAX_RELATIVE_ERROR[precision]:g}"
        )
    return {"max_abs": max(error.max_abs for error in errors.values()), "max_rel": largest.max_rel}


def check_tokens(
    checkpoint: Checkpoint, bundle: Bundle, images: Sequence[ImageInput] = (PHOTOGRAPH,)
) -> dict[str, Any]:
    """Compares whole answers of a bundle, on the CPU provider, with those of transformers.

    Args:
        checkpoint: The original.
        bundle: Its export.
        images: The images to run `TASKS` on.

    Returns:
        `{"equal": …, "total": …}` tokens by the name of the search.

    Raises:
        VerificationError: Tokens differ although the precision is in `EXACT`.
    """
    model = Florence2.from_bundle(bundle, LoadOptions(device="cpu"))
    found = {}
    for name, options in SEARCHES.items():
        agreement = _token_agreement(checkpoint, bundle, model, images, options)
        if bundle.precision in EXACT and not agreement.is_exact:
            raise VerificationError(
                f"{name} decoding of {bundle.path} gives other tokens than transformers: "
                f"{agreement.equal} of {agreement.total} agree"
            )
        found[name] = asdict(agreement)
    return found


def _token_agreement(
    checkpoint: Checkpoint, bundle: Bundle, model: Florence2, images: Sequence[ImageInput], options: GenerationOptions
) -> TokenAgreement:
    sizes = bundle.sizes
    equal = total = 0
    for image in map(decoding.load, images):
        pixels = preprocessing.preprocess(image, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)
        for task in TASKS:
            expected = reference.generate(checkpoint, pixels, [task.format_prompt()], options)[0]
            answer = model.run(task, image, options=options).token_ids
            equal += sum(a == b for a, b in zip(expected, answer, strict=False))
            total += max(len(expected), len(answer))
    return TokenAgreement(equal, total)
