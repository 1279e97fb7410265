"""What every search has in common: its interface, its answers, and the tokens known before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import Floats, Ids, StepScores

__all__ = ["Continuation", "Floats", "GeneratedSequence", "GivenAnswer", "Ids", "Search", "opening"]


@dataclass(frozen=True)
class GeneratedSequence:
    """One answer in tokens."""

    token_ids: tuple[int, ...]
    """From the decoder start token to the end token, without padding."""
    truncated: bool
    """Whether the token limit ended it before the model did."""


@dataclass(frozen=True)
class Continuation:
    """What the decoder does next."""

    rows: Ids
    """`(R,)` the present row that each next row continues."""
    prompts: Ids
    """`(P,)` the present prompts that stay."""
    token_ids: Ids
    """`(R, S)` what each next row is fed; every token behind the first is a draft to be verified."""
    kept: Ids | None = None
    """`(present rows,)` how many of the tokens last fed hold; None where all do."""


class Search(Protocol):
    """A way to choose tokens."""

    def start(self) -> Ids:
        """The tokens `(P, S)` that open every prompt's answer."""

    def advance(self, scores: StepScores) -> Continuation | None:
        """Takes the next decision.

        Args:
            scores: After each token that was fed; at the start after the last one only.

        Returns:
            How to go on, or None when all is done.
        """

    def results(self) -> list[GeneratedSequence]:
        """One answer per prompt, in the order of the prompts."""


class GivenAnswer:
    """No search: one answer that is known, to see what the model expects at each of its places."""

    def __init__(self, token_ids: Sequence[int], logits: Floats) -> None:
        """Args:
        token_ids: L tokens, from the decoder start token on; at least two.
        logits: `(L - 1, V)`, filled: row i is what the model expects after the first i + 1 tokens.
        """
        self._token_ids = list(token_ids)
        self._logits = logits
        self._num_done = 0

    def start(self) -> Ids:
        return np.array([self._token_ids[:1]], dtype=np.int64)

    def advance(self, scores: StepScores) -> Continuation | None:
        self._logits[self._num_done] = scores.logits(0, 0)
        self._num_done += 1
        if self._num_done == len(self._logits):
            return None
        only = np.zeros(1, dtype=np.int64)
        return Continuation(only, only, np.array([[self._token_ids[self._num_done]]], dtype=np.int64))

    def results(self) -> list[GeneratedSequence]:
        return [GeneratedSequence(tuple(self._token_ids), False)]


def opening(config: SearchConfig) -> list[int]:
    """The tokens known before anything is computed: the start token, and a forced first token after it.

    Feeding both in one step saves a decoder call. Where the limit leaves room for one token only, the forced last
    token has precedence, as in transformers.
    """
    forced = config.forced_bos_token_id
    if forced is None or forced == config.eos_token_id or config.max_length <= 2:
        return [config.decoder_start_token_id]
    return [config.decoder_start_token_id, forced]
