"""Generation options: those of a call, the defaults of a checkpoint, and the checked configuration made of both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from florence_onnx.errors import OptionsError

EarlyStopping = bool | Literal["never"]
DEFAULT_MAX_NEW_TOKENS = 1024
"""The value in Microsoft's samples. The default of transformers, 20 tokens, would cut most answers off."""
MAX_BEAMS = 64
MAX_NGRAM = 1024
MAX_PROMPT_LOOKUP = 64
DEFAULT_PROMPT_LOOKUP = 4
"""Tokens per draft: 4 save nearly as many decoder calls as 8 (`python -m benchmarks.cpu.speculation`)."""
MAX_LENGTH_PENALTY = 10
"""Beyond this, length ** penalty overflows float32 for the longest answers."""


@dataclass(frozen=True)
class GenerationOptions:
    """Generation options of one call. None takes the checkpoint's value."""

    num_beams: int | None = None
    """Beams kept per prompt; 1 is greedy search."""
    max_new_tokens: int | None = None
    """Most tokens to generate, end token included; at most the model's number of positions, which is the default where
    it is below 1024."""
    min_new_tokens: int | None = None
    """Fewest tokens to generate; the end token is banned before that."""
    length_penalty: float | None = None
    """A hypothesis scores its sum of log-probabilities / length ** length_penalty (beam search only)."""
    early_stopping: EarlyStopping | None = None
    """When beam search ends. True: at `num_beams` finished hypotheses. False: when a better one is unlikely. "never":
    when a better one is impossible."""
    no_repeat_ngram_size: int | None = None
    """Length of the n-grams that must not occur twice; 0 allows all."""
    forced_bos_token_id: int | None = None
    """Token forced in first position; -1 forces none."""
    forced_eos_token_id: int | None = None
    """Token forced in last position when the token limit is reached; -1 forces none."""
    prompt_lookup_num_tokens: int | None = None
    """Most tokens drafted from the input and verified in one decoder call (greedy search only); 0 drafts none. Drafts
    save decoder calls and do not change the tokens."""


@dataclass(frozen=True)
class SearchConfig:
    """A complete and checked set of generation options."""

    decoder_start_token_id: int
    eos_token_id: int
    max_length: int
    """Most tokens in a sequence, decoder start token included."""
    num_beams: int = 1
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False
    no_repeat_ngram_size: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    prompt_lookup_num_tokens: int = 0


@dataclass(frozen=True)
class GenerationDefaults:
    """Generation defaults of a checkpoint (`generation_config.json`), and the limits of its model."""

    decoder_start_token_id: int
    eos_token_id: int
    max_positions: int
    vocab_size: int
    options: GenerationOptions = GenerationOptions()

    def resolve(self, options: GenerationOptions | None) -> SearchConfig:
        """Merges the options of a call over the checkpoint's.

        Args:
            options: Options of the call; None takes the checkpoint's.

        Raises:
            OptionsError: A value is out of range or contradicts another.
        """
        if options is not None and not isinstance(options, GenerationOptions):
            raise OptionsError(f"options must be a GenerationOptions, got {type(options).__name__}")
        merged = self.options if options is None else _merge(self.options, options)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            _check_range(name, _given(getattr(merged, name), -1), -1, self.vocab_size - 1)
        limit = self.max_positions
        max_new = merged.max_new_tokens if merged.max_new_tokens is not None else min(DEFAULT_MAX_NEW_TOKENS, limit)
        _check_range("max_new_tokens", max_new, 1, limit)
        config = SearchConfig(
            decoder_start_token_id=self.decoder_start_token_id,
            eos_token_id=self.eos_token_id,
            max_length=1 + max_new,
            num_beams=_given(merged.num_beams, 1),
            min_new_tokens=_given(merged.min_new_tokens, 0),
            length_penalty=_given(merged.length_penalty, 1.0),
            early_stopping=_given(merged.early_stopping, False),
            no_repeat_ngram_size=_given(merged.no_repeat_ngram_size, 0),
            forced_bos_token_id=_token_or_none(merged.forced_bos_token_id),
            forced_eos_token_id=_token_or_none(merged.forced_eos_token_id),
            prompt_lookup_num_tokens=_given(merged.prompt_lookup_num_tokens, DEFAULT_PROMPT_LOOKUP),
        )
        _check_config(config, max_new)
        return config


def _given(value: Any, default: Any) -> Any:
    return default if value is None else value


def _token_or_none(value: int | None) -> int | None:
    return None if value is None or value < 0 else value


def _merge(base: GenerationOptions, over: GenerationOptions) -> GenerationOptions:
    return replace(base, **{name: value for name, value in vars(over).items() if value is not None})


def _check_range(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise OptionsError(f"{name} must be a whole number from {low} to {high}, got {value!r}")


def _check_config(config: SearchConfig, max_new: int) -> None:
    _check_range("num_beams", config.num_beams, 1, MAX_BEAMS)
    _check_range("no_repeat_ngram_size", config.no_repeat_ngram_size, 0, MAX_NGRAM)
    _check_range("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens, 0, MAX_PROMPT_LOOKUP)
    _check_range("min_new_tokens", config.min_new_tokens, 0, max_new)
    stopping = config.early_stopping
    if not isinstance(stopping, bool) and not (isinstance(stopping, str) and stopping == "never"):
        raise OptionsError(f'early_stopping must be True, False or "never", got {stopping!r}')
    penalty = config.length_penalty
    is_number = isinstance(penalty, int | float | np.floating) and not isinstance(penalty, bool)
    if not is_number or not abs(penalty) <= MAX_LENGTH_PENALTY:
        raise OptionsError(
            f"length_penalty must be a number from {-MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, got {penalty!r}"
        )
