"""Answers of transformers itself, for comparison: same pixels, same prompts, same options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from florence_onnx.options import GenerationOptions

from .checkpoint import Checkpoint


def image_features(checkpoint: Checkpoint, pixel_values: npt.NDArray[np.float32]) -> torch.Tensor:
    """The vision encoder's output `(B, N, D)` for `pixel_values` `(B, 3, height, width)`."""
    with torch.inference_mode():
        features: torch.Tensor = checkpoint.model.get_image_features(torch.from_numpy(pixel_values))
    return features


def generate(
    checkpoint: Checkpoint,
    pixel_values: npt.NDArray[np.float32],
    prompts: Sequence[str],
    options: GenerationOptions | None = None,
) -> list[tuple[int, ...]]:
    """Token ids that `Florence2ForConditionalGeneration.generate` gives.

    Args:
        checkpoint: The model.
        pixel_values: `(B, 3, height, width)`, one picture per prompt.
        prompts: B prompts, padded on the right to the longest.
        options: What is not None overrides the checkpoint's defaults; -1 forces no token.

    Returns:
        Per prompt the ids from the decoder start token to the end token, without padding.
    """
    model = checkpoint.model
    ids = [encoding.ids for encoding in checkpoint.tokenizer.encode_batch(list(prompts))]
    pad = model.config.text_config.pad_token_id
    longest = max(map(len, ids))
    rows = [
        [model.config.image_token_id] * checkpoint.num_image_tokens + row + [pad] * (longest - len(row)) for row in ids
    ]
    mask = [[1] * (checkpoint.num_image_tokens + len(row)) + [0] * (longest - len(row)) for row in ids]
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            pixel_values=torch.from_numpy(pixel_values),
            do_sample=False,
            **_arguments(checkpoint, options or GenerationOptions()),
        )
    end = model.generation_config.eos_token_id
    return [_until_end(row, end) for row in tokens.tolist()]


def _arguments(checkpoint: Checkpoint, options: GenerationOptions) -> dict[str, Any]:
    """Keyword arguments, which transformers obeys, unlike fields of a GenerationConfig that equal its defaults (4.57)."""
    given = {name: value for name, value in vars(options).items() if value is not None}
    known = {name: checkpoint.generation[name] for name in vars(options) if checkpoint.generation.get(name) is not None}
    merged = {"max_new_tokens": 1024} | known | given
    return {name: None if name.startswith("forced_") and value == -1 else value for name, value in merged.items()}


def _until_end(row: list[int], end: int) -> tuple[int, ...]:
    """Cuts padding. The decoder start token equals the end token in Florence-2, hence the search from the second."""
    length = row.index(end, 1) + 1 if end in row[1:] else len(row)
    return tuple(row[:length])
