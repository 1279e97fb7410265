"""transformers' Florence-2 model class, as far as tools call it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from florence_onnx.compat.arrays import Array, as_array
from florence_onnx.compat.names import loading_arguments, resolve_name
from florence_onnx.errors import OptionsError
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.model import Florence2

AllowedTokens: TypeAlias = Callable[[int, Array], Iterable[int]]
_IGNORED = {"use_cache", "return_dict_in_generate", "output_scores", "pad_token_id"}
_OFF: dict[str, Any] = {
    "do_sample": False,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "num_return_sequences": 1,
}
"""Options of `generate` that mean nothing at these values."""


class Florence2ForConditionalGeneration:
    """Called as transformers' class of that name."""

    def __init__(self, florence: Florence2) -> None:
        """Args: florence, the loaded model."""
        self.florence = florence
        info = florence.info()
        self.device = info["provider"]
        self.dtype = info["precision"]
        self.config = SimpleNamespace(model_type="florence2", **info["model"])

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **arguments: Any) -> Florence2ForConditionalGeneration:
        """Loads a model.

        Args:
            name: As for `Florence2Processor.from_pretrained`.
            arguments: Those of `Florence2.from_pretrained`; transformers' own (`torch_dtype`, …) do nothing.

        Raises:
            BundleError: There is none.
            InputError: An argument is unknown.
            ProviderError: The execution provider cannot run here.
        """
        return cls(Florence2.from_pretrained(resolve_name(name), **loading_arguments(arguments)))

    def to(self, *_: Any, **__: Any) -> Florence2ForConditionalGeneration:
        """The model itself: device and precision are chosen when it is loaded."""
        return self

    cuda = cpu = half = float = bfloat16 = eval = requires_grad_ = to

    def generate(
        self,
        input_ids: npt.ArrayLike,
        pixel_values: npt.ArrayLike,
        attention_mask: npt.ArrayLike | None = None,
        **arguments: Any,
    ) -> Array:
        """Generates.

        Args:
            input_ids: `(B, T)`, as the processor made them. Image tokens in front, as transformers' own processor writes them, are
                taken off.
            pixel_values: `(B, 3, H, W)`.
            attention_mask: `(B, T)`; None: all that is not padding.
            arguments: Options by transformers' names, as far as `GenerationOptions` has them; and `prefix_allowed_tokens_fn`, which
                takes the index of a prompt and the ids of its answer so far, `(L,)` int64, and returns the ids that may follow.

        Returns:
            `(B, L)` int64: ids from the decoder start token on, padded with the padding token to the longest.

        Raises:
            OptionsError: An option is unknown, or not supported at that value.
            InputError: Shapes do not fit this model.
        """
        allowed: AllowedTokens | None = arguments.pop("prefix_allowed_tokens_fn", None)
        options = _options(arguments)
        images = self.florence.encode_pixels(np.asarray(pixel_values, dtype=np.float32))
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = None if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        first = _num_leading_image_tokens(ids, images[0].num_image_tokens) if images else 0
        ids, mask = ids[:, first:], None if mask is None else mask[:, first:]
        if allowed is None:
            answers = self.florence.generate_tokens(images, ids, mask, options)
        else:  # one by one, since the function is told which prompt it is
            answers = [
                self.florence.generate_tokens(
                    images[row : row + 1],
                    ids[row : row + 1],
                    None if mask is None else mask[row : row + 1],
                    replace(options, constrain=_of_prompt(allowed, row)),
                )[0]
                for row in range(len(ids))
            ]
        longest = max(len(answer.token_ids) for answer in answers)
        padded = np.full((len(answers), longest), self.config.pad_token_id, dtype=np.int64)
        for row, answer in zip(padded, answers, strict=True):
            row[: len(answer.token_ids)] = answer.token_ids
        return as_array(padded, np.int64)


def _of_prompt(allowed: AllowedTokens, row: int) -> Callable[[list[int]], Iterable[int]]:
    return lambda tokens: allowed(row, as_array(np.asarray(tokens, dtype=np.int64), np.int64))


def _num_leading_image_tokens(ids: npt.NDArray[np.int64], count: int) -> int:
    """Tokens in front that are one and the same, as often as an image has tokens (`count`)."""
    leading = ids[:, :count]
    return count if ids.shape[1] > count > 1 and (leading == ids[0, 0]).all() else 0


def _options(arguments: dict[str, Any]) -> GenerationOptions:
    known = GenerationOptions.__dataclass_fields__
    given: dict[str, Any] = {}
    for name, value in arguments.items():
        if name in known:
            given[name] = value
        elif name not in _IGNORED and not (name in _OFF and value in (_OFF[name], None)):
            raise OptionsError(f"generate does not support {name}={value!r} here; supported are {', '.join(known)}")
    return GenerationOptions(**given)
