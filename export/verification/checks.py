"""The checks of every export: each graph against its torch module, then whole answers against transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from florence_onnx import tasks
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import VerificationError
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.images import decoding, preprocessing
from florence_onnx.images.decoding import ImageInput
from florence_onnx.model import Florence2
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.tasks import Task

from ..checkpoints.checkpoint import Checkpoint
from ..graphs.comparison import OutputError, compare, worst
from ..graphs.plans import GraphPlan
from . import reference
from .photograph import PHOTOGRAPH
from .reference import Encoded

MAX_RELATIVE_ERROR = {"fp32": 1e-4, "fp16": 5e-2, "int8": 0.5, "int4": 0.9}
"""Bound on `OutputError.max_rel` of every output of a graph, by precision.

In fp32 another order of the sums changes an output by about 1e-6 of its largest value. In fp16 every value is rounded
by up to 2**-11 (5e-4), layer after layer. In int8 and int4 the errors depend on the weights, and those of random
weights are large, so these two bounds catch broken conversions only; `python -m export verify` measures how good a
conversion is.
"""

EXACT = ("fp32",)
"""Precisions in which every token must equal the checkpoint's. Others may differ where two logits are close."""

_COMMON: dict[str, Any] = {"max_new_tokens": 48}
if "do_sample" in GenerationOptions.__dataclass_fields__:
    _COMMON["do_sample"] = False  # a checkpoint that samples by default is compared without chance

SEARCHES = {
    "greedy": GenerationOptions(num_beams=1, **_COMMON),
    "beam-3": GenerationOptions(num_beams=3, **_COMMON),
}
"""The searches that `check_tokens` compares; all other settings are the checkpoint's own on both sides."""
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

    def __add__(self, other: TokenAgreement) -> TokenAgreement:
        return TokenAgreement(self.equal + other.equal, self.total + other.total)


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
            f"{name} does not reproduce the checkpoint in {precision}: output {output} is off by "
            f"{largest.max_abs:.3g}, "
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
    found = {name: TokenAgreement(0, 0) for name in SEARCHES}
    for image in map(decoding.load, images):
        # encoded once for all searches: at full size that is most of the time
        encoded = model.encode(image)
        for task, inputs in _encode(checkpoint, bundle, image):
            for name, options in SEARCHES.items():
                expected = reference.search(checkpoint, inputs, options)[0]
                found[name] += _compare(expected, model.run(task, encoded, options=options).token_ids)
    for name, agreement in found.items():
        if bundle.precision in EXACT and not agreement.is_exact:
            raise VerificationError(
                f"{name} decoding of {bundle.path} gives other tokens than transformers: "
                f"{agreement.equal} of {agreement.total} agree"
            )
    return {name: asdict(agreement) for name, agreement in found.items()}


def _encode(checkpoint: Checkpoint, bundle: Bundle, image: Image.Image) -> Iterator[tuple[Task[Any], Encoded]]:
    """One image and the prompt of every task, after the encoder of transformers."""
    sizes = bundle.sizes
    pixels = preprocessing.preprocess(image, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)
    for task in TASKS:
        yield task, reference.encode(checkpoint, pixels, [task.format_prompt()])


def _compare(expected: Sequence[int], answer: Sequence[int]) -> TokenAgreement:
    return TokenAgreement(sum(a == b for a, b in zip(expected, answer, strict=False)), max(len(expected), len(answer)))
