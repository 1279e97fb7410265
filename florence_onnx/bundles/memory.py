"""Device memory: how much a model needs, and how ONNX Runtime reports that there is not enough.

The need is computed, not measured: weights and activations of each graph as the export found them in the graph
(`export/bundles/memory.py`), caches and buffers from the model's sizes. Arenas allocate in chunks and release nothing,
so real use is somewhat higher; `CONTEXT_BYTES` for CUDA itself is an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from florence_onnx.bundles.bundle import Bundle

CONTEXT_BYTES = 500 * 2**20
"""CUDA context and workspaces of cuBLAS and cuDNN. Assumed: it differs between GPUs and drivers."""
IMAGE = "picture"
"""Key in a bundle's `memory`: bytes of activations of the vision encoder per image. A name in files of format 3."""
MAX_IMAGES = 8
"""Most images that are encoded in one call."""
ITEMSIZES = {"fp32": 4, "fp16": 2}
"""Bytes of an element of the KV caches, by precision."""
CAPACITY = 256
"""Assumed slots of a prompt's self KV cache: enough for answers of about 200 tokens with three beams."""
BATCHES = (1, 8, 32)
BEAMS = (1, 3)
OUT_OF_MEMORY = (
    "Failed to allocate memory for requested buffer",
    "is smaller than requested bytes",
    "out of memory",
    "bad_alloc",
    "bad allocation",
    "Cannot allocate memory",
    "CUDA failure 2:",
    "_STATUS_ALLOC_FAILED",
)
"""Parts of the messages of ONNX Runtime's arena (the first two, observed), of CUDA, of C++ (`std::bad_alloc` where a graph is
loaded, observed; the other word is Microsoft's compiler's), of the system (ENOMEM), and of cuBLAS and cuDNN. ONNX Runtime
has no exception type for this."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of ONNX Runtime means that memory, of the device or of the process, is full."""
    return isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY)


@dataclass(frozen=True)
class MemoryEstimate:
    """Device memory of a model, in bytes.

    Example: `MemoryEstimate(weights=…, activations=…, caches=…, buffers=…)`
    """

    weights: int
    """Weights of the three graphs. Those that two graphs share count twice, since each session has its own copy."""
    activations: int
    """Peak activations of the three graphs, added up: each session has an arena, which never shrinks."""
    caches: int
    """Cross KV and self KV of all prompts."""
    buffers: int
    """Input pixels, image features and logits."""

    @property
    def total(self) -> int:
        """The sum, `CONTEXT_BYTES` included."""
        return self.weights + self.activations + self.caches + self.buffers + CONTEXT_BYTES


def estimate(
    bundle: Bundle, batch: int, num_beams: int, *, num_prompt_tokens: int = 16, capacity: int = CAPACITY
) -> MemoryEstimate | None:
    """Estimates the most device memory that a bundle uses for a number of prompts in flight.

    Args:
        bundle: An fp32 or fp16 bundle.
        batch: Prompts in flight.
        num_beams: Beams of each prompt.
        num_prompt_tokens: Padded length of the prompts in tokens.
        capacity: Slots of the self KV cache of each prompt.

    Returns:
        The estimate, or None for a bundle whose description has no such data (other layouts and precisions).
    """
    facts, sizes = bundle.memory, bundle.sizes
    if not facts or bundle.precision not in ITEMSIZES:
        return None
    length = sizes.num_image_tokens + num_prompt_tokens
    # keys and values of all layers for one position of a prompt
    position = 2 * sizes.decoder_layers * sizes.width * ITEMSIZES[bundle.precision]
    images = min(MAX_IMAGES, batch)
    width, height = sizes.image_size
    features = 4 * sizes.num_image_tokens * sizes.width
    # A decode step feeds one token per beam, the first one of an answer two tokens. Their buffers differ in size, and
    # an arena seldom fits one into the free chunks of the other, so both are counted.
    tokens = num_beams + 2
    activations = (
        facts[IMAGE] * images + _text_encoder_bytes(facts, num_prompt_tokens) + facts["token"] * tokens * batch
    )
    buffers = (
        images * (4 * 3 * width * height + features) + (batch + 1) * features + 4 * sizes.vocab_size * tokens * batch
    )
    weights = sum(facts["weights"].values())
    return MemoryEstimate(weights, activations, position * (length + capacity) * batch, buffers)


def _text_encoder_bytes(facts: Mapping[str, Any], num_tokens: int) -> int:
    """Bytes of activations for prompts of this length: those of the shortest measured length that is not below it."""
    return int(
        next((size for length, size in facts["text_encoder"] if num_tokens <= length), facts["text_encoder"][-1][1])
    )


def table(bundle: Bundle) -> list[dict[str, int]] | None:
    """Estimates for `BATCHES` and `BEAMS`, ready for JSON: `batch`, `num_beams`, and the parts and `total` in bytes."""
    found = []
    for batch in BATCHES:
        for num_beams in BEAMS:
            need = estimate(bundle, batch, num_beams)
            if need is None:
                return None
            found.append({"batch": batch, "num_beams": num_beams, **asdict(need), "total": need.total})
    return found
