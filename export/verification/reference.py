"""transformers' own answers and logits, for the same pixels, prompts and options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutput

from florence_onnx.generation.options import DEFAULT_MAX_NEW_TOKENS, GenerationOptions

from ..checkpoints.checkpoint import Checkpoint


def image_features(checkpoint: Checkpoint, pixel_values: npt.NDArray[np.float32]) -> torch.Tensor:
    """Runs the vision encoder: `pixel_values` `(B, 3, H, W)` to `image_features` `(B, N, D)`."""
    with torch.inference_mode():
        features: torch.Tensor = checkpoint.reference.get_image_features(torch.from_numpy(pixel_values))
    return features


def generate(
    checkpoint: Checkpoint,
    pixel_values: npt.NDArray[np.float32],
    prompts: Sequence[str],
    options: GenerationOptions | None = None,
) -> list[tuple[int, ...]]:
    """Generates with `Florence2ForConditionalGeneration.generate`.

    Args:
        checkpoint: The model.
        pixel_values: `(B, 3, H, W)`, one image per prompt.
        prompts: B prompts; they are padded on the right to the longest.
        options: Fields that are not None override the checkpoint's defaults; -1 means that no token is forced.

    Returns:
        For each prompt the token ids from the decoder start token to the end token, without padding.
    """
    return search(checkpoint, encode(checkpoint, pixel_values, prompts), options)


@dataclass(frozen=True)
class Encoded:
    """Images and prompts after transformers' text encoder: N image tokens and T prompt tokens in each row."""

    hidden_states: torch.Tensor
    """`(B, N + T, D)`."""
    attention_mask: torch.Tensor
    """`(B, N + T)`, 1 for tokens and 0 for padding."""
    input_ids: torch.Tensor
    """`(B, N + T)`, with the image token's id in the positions of the image."""


def encode(checkpoint: Checkpoint, pixel_values: npt.NDArray[np.float32], prompts: Sequence[str]) -> Encoded:
    """Runs both encoders; the result serves any number of searches. The arguments are those of `generate`."""
    model = checkpoint.reference
    ids = [encoding.ids for encoding in checkpoint.tokenizer.encode_batch(list(prompts))]
    pad = model.config.text_config.pad_token_id
    longest = max(map(len, ids))
    rows = [
        [model.config.image_token_id] * checkpoint.num_image_tokens + row + [pad] * (longest - len(row)) for row in ids
    ]
    mask = [[1] * (checkpoint.num_image_tokens + len(row)) + [0] * (longest - len(row)) for row in ids]
    attention_mask, input_ids = torch.tensor(mask), torch.tensor(rows)
    with torch.inference_mode():
        # The decoder runs too, and its output is not used. Its input is given because transformers' own default reads
        # text_config.decoder_start_token_id, which a checkpoint need not have.
        outputs = model.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=torch.from_numpy(pixel_values),
            decoder_input_ids=torch.full((len(rows), 1), model.generation_config.decoder_start_token_id),
        )
    return Encoded(outputs.encoder_last_hidden_state, attention_mask, input_ids)


def search(checkpoint: Checkpoint, encoded: Encoded, options: GenerationOptions | None = None) -> list[tuple[int, ...]]:
    """Generates from encoded prompts; returns what `generate` returns.

    Nothing but `options` is passed: all else is what the checkpoint's own generation config says, so that a setting
    that is lost on the way into a bundle shows as other tokens. Without `max_new_tokens` the limit is 1024, as in a
    bundle.
    """
    model = checkpoint.reference
    with torch.inference_mode():
        tokens = model.generate(
            input_ids=encoded.input_ids,  # for settings that look at the prompt; it is not encoded again
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_states),
            attention_mask=encoded.attention_mask,
            **_arguments(options or GenerationOptions()),
        )
    end = model.generation_config.eos_token_id
    return [_until_end(row, end if isinstance(end, list) else [end]) for row in tokens.tolist()]


def score(checkpoint: Checkpoint, encoded: Encoded, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Computes the logits at every position of a given answer in one pass (teacher forcing).

    Args:
        checkpoint: The model.
        encoded: One image and prompt.
        token_ids: L tokens, the decoder start token first.

    Returns:
        `(L - 1, V)` float32: row i holds the logits after the first i + 1 tokens.
    """
    with torch.inference_mode():
        outputs = checkpoint.reference(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded.hidden_states),
            attention_mask=encoded.attention_mask,
            decoder_input_ids=torch.tensor([list(token_ids[:-1])]),
            use_cache=False,
        )
    logits: npt.NDArray[np.float32] = outputs.logits[0].numpy()
    return logits


def _arguments(options: GenerationOptions) -> dict[str, Any]:
    """Keyword arguments, which transformers obeys, unlike fields of a GenerationConfig that equal its defaults
    (4.57)."""
    known = GenerationConfig().to_dict().keys() - {"prompt_lookup_num_tokens"}  # which changes no token
    given = {name: _as_list(value) for name, value in vars(options).items() if value is not None and name in known}
    merged = {"max_new_tokens": DEFAULT_MAX_NEW_TOKENS} | given
    return {name: None if name.startswith("forced_") and value == -1 else value for name, value in merged.items()}


def _as_list(value: Any) -> Any:
    return [_as_list(each) for each in value] if isinstance(value, tuple) else value


def _until_end(row: list[int], ends: Sequence[int]) -> tuple[int, ...]:
    """Cuts padding. The decoder start token equals the end token in Florence-2, hence the search from the second."""
    length = next((place + 1 for place, token in enumerate(row) if place and token in ends), len(row))
    return tuple(row[:length])
