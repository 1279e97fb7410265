"""Memory of a device: what a model is going to need, and how ONNX Runtime says that there is not enough.

The need is computed, not measured: weights and activations of each graph as its export found them in it
(`export/bundles/memory.py`), caches and buffers from the sizes of the model. Arenas take memory in pieces and give none
back, so a little more is used; a card's own needs, `CONTEXT_BYTES`, are an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from florence_onnx.bundles.bundle import Bundle

CONTEXT_BYTES = 500 * 2**20
"""CUDA's context and the workspaces of cuBLAS and cuDNN. Assumed: it differs by card and driver."""
IMAGE = "picture"
"""Key of a bundle's `memory` on disk: bytes of activations for each image of the vision encoder. Its name is that of format 3."""
MAX_IMAGES = 8
"""Images that are encoded at a time at most."""
ITEMSIZES = {"fp32": 4, "fp16": 2}
"""Bytes of a number in the caches, by precision."""
CAPACITY = 256
"""Slots of a prompt's cache that are reckoned with: answers of about 200 tokens with three beams."""
BATCHES = (1, 8, 32)
BEAMS = (1, 3)
OUT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer",
    "is smaller than requested bytes",
    "out of memory",
    "CUDA failure 2:",
    "_STATUS_ALLOC_FAILED",
)
"""What stands in the messages of ONNX Runtime's arena (the first two, seen), of CUDA, cuBLAS and cuDNN."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ONNX Runtime says that a device's memory, or the part of it that is allowed, is full."""
    return isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on a device.

    Example: `MemoryEstimate(weights=…, activations=…, caches=…, buffers=…)`
    """

    weights: int
    """Of the three graphs; what two of them share is there twice, since each session holds its own."""
    activations: int
    """At the fullest moment of each graph, and all three: each has an arena, which keeps what it took."""
    caches: int
    """Cross and self keys and values of all prompts."""
    buffers: int
    """Pixels, features and logits."""

    @property
    def total(self) -> int:
        """Everything, `CONTEXT_BYTES` included."""
        return self.weights + self.activations + self.caches + self.buffers + CONTEXT_BYTES


def estimate(
    bundle: Bundle, batch: int, num_beams: int, *, num_prompt_tokens: int = 16, capacity: int = CAPACITY
) -> MemoryEstimate | None:
    """What a bundle needs on a device at the most, once it has answered so many prompts at a time.

    Args:
        bundle: An fp32 or fp16 bundle.
        batch: Prompts in flight.
        num_beams: Beams of each.
        num_prompt_tokens: Padded length of the prompts.
        capacity: Slots of each prompt's cache.

    Returns:
        None where the bundle does not say what its graphs need: other layouts and precisions.
    """
    facts, sizes = bundle.memory, bundle.sizes
    if not facts or bundle.precision not in ITEMSIZES:
        return None
    length = sizes.num_image_tokens + num_prompt_tokens
    # keys and values of every layer, for each of a prompt's positions
    position = 2 * sizes.decoder_layers * sizes.width * ITEMSIZES[bundle.precision]
    images = min(MAX_IMAGES, batch)
    width, height = sizes.image_size
    features = 4 * sizes.num_image_tokens * sizes.width
    tokens = (
        num_beams + 2
    )  # the usual step and the one that opens an answer: what one needs seldom fits into what the other left
    activations = facts[IMAGE] * images + _of_text(facts, num_prompt_tokens) + facts["token"] * tokens * batch
    buffers = (
        images * (4 * 3 * width * height + features) + (batch + 1) * features + 4 * sizes.vocab_size * tokens * batch
    )
    weights = sum(facts["weights"].values())
    return MemoryEstimate(weights, activations, position * (length + capacity) * batch, buffers)


def _of_text(facts: Mapping[str, Any], num_tokens: int) -> int:
    """Of the sizes that were looked at the least that suffices."""
    return int(
        next((size for length, size in facts["text_encoder"] if num_tokens <= length), facts["text_encoder"][-1][1])
    )


def table(bundle: Bundle) -> list[dict[str, int]] | None:
    """Estimates for usual numbers of prompts and beams, ready for JSON: `batch`, `num_beams`, the parts and `total`, in bytes."""
    found = []
    for batch in BATCHES:
        for num_beams in BEAMS:
            need = estimate(bundle, batch, num_beams)
            if need is None:
                return None
            found.append({"batch": batch, "num_beams": num_beams, **asdict(need), "total": need.total})
    return found
