"""Whether an exported bundle answers as its checkpoint does: graph by graph, then token by token."""

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
"""Largest error of a graph's output, as a share of that output's largest magnitude, by precision.

For integers this catches broken conversions only: how good one is, `python -m export verify` measures.
"""

EXACT = ("fp32",)
"""Precisions whose tokens must equal the checkpoint's."""

_COMMON: dict[str, Any] = {"max_new_tokens": 48}
if "do_sample" in GenerationOptions.__dataclass_fields__:
    _COMMON["do_sample"] = False  # a checkpoint that samples by default is compared without chance

SEARCHES = {
    "greedy": GenerationOptions(num_beams=1, **_COMMON),
    "beam-3": GenerationOptions(num_beams=3, **_COMMON),
}
"""All other settings are the checkpoint's own on both sides."""
TASKS = (tasks.OBJECT_DETECTION, tasks.DETAILED_CAPTION)


@dataclass(frozen=True)
class TokenAgreement:
    """How many of the checkpoint's tokens a bundle reproduces, in place."""

    equal: int
    total: int

    @property
    def is_exact(self) -> bool:
        """Whether the answers are the same."""
        return self.equal == self.total


def compare_graph(plan: GraphPlan, path: Path) -> dict[str, OutputError]:
    """Runs a converted graph and its torch module on the same inputs.

    Args:
        plan: What the graph was exported from.
        path: The file, in any precision.

    Returns:
        The errors by output.
    """
    batches = (plan.inputs, *plan.check_inputs)
    return worst(compare(plan.module, path, inputs, plan.outputs) for inputs in batches)


def check_graph(name: str, errors: Mapping[str, OutputError], precision: str) -> dict[str, Any]:
    """Summarises the errors of one graph.

    Raises:
        VerificationError: One is beyond the precision's bound.
    """
    output, largest = max(errors.items(), key=lambda item: item[1].max_rel)
    if not largest.max_rel <= MAX_RELATIVE_ERROR[precision]:
        raise VerificationError(
            f"{name} does not reproduce the checkpoint in {precision}: output {output} is off by {largest.max_abs:.3g}, "
            f"{largest.max_rel:.3g} of its largest value; allowed is {MAX_RELATIVE_ERROR[precision]:g}"
        )
    return {"max_abs": max(error.max_abs for error in errors.values()), "max_rel": largest.max_rel}


def check_tokens(
    checkpoint: Checkpoint, bundle: Bundle, images: Sequence[ImageInput] = (PHOTOGRAPH,)
) -> dict[str, Any]:
    """Compares whole answers of a bundle with transformers'.

    Args:
        checkpoint: The original.
        bundle: Its export.
        images: What to ask about.

    Returns:
        Per search, how many tokens agree.

    Raises:
        VerificationError: They differ although the precision is exact.
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
