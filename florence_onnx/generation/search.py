"""What all searches share: their interface, their results, and the tokens known before the first decoder call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from florence_onnx.generation.constraints import ConstrainedRow, Constraint
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import StopReason, Truncated
from florence_onnx.generation.scores import Floats, Ids, StepScores
from florence_onnx.generation.token_scores import TokenScorer, TokenScores

__all__ = ["DecodeStep", "Floats", "GeneratedSequence", "Ids", "Search", "TeacherForcing", "initial_tokens"]


@dataclass(frozen=True)
class GeneratedSequence:
    """The generated tokens of one prompt."""

    token_ids: tuple[int, ...]
    """From the decoder start token to the end token, without padding."""
    truncated: Truncated
    """Whether the token limit ended the answer before the model did, or why the caller did."""
    alternatives: tuple[GeneratedSequence, ...] = ()
    """The other answers to the prompt, where `num_return_sequences` asks for some; in beam search best first."""
    scores: TokenScores | None = None
    """Probabilities of the tokens, where the option `scores` asks for them."""
    choices: tuple[tuple[tuple[int, ...], float], ...] = ()
    """Of each choice its tokens and its log-probability, end token included, where the answer is one of some choices."""


@dataclass(frozen=True)
class DecodeStep:
    """The next decode step of a search: which rows go on, and which tokens they are fed."""

    rows: Ids
    """`(R,)`, for each row of the step the current row whose history it continues."""
    prompts: Ids
    """`(P,)`, the current prompts that stay in the batch, increasing; finished ones leave it."""
    token_ids: Ids
    """`(R, S)`, tokens fed to each row: the one chosen last, then drafts to be verified."""
    kept: Ids | None = None
    """`(current rows,)`, how many of the tokens fed last time were accepted; None where all were."""


class Search(Protocol):
    """A strategy that chooses tokens for a batch of prompts, one decoder call at a time."""

    def start(self) -> Ids:
        """The tokens `(P, S)` fed in the first decoder call, one row per prompt."""

    def advance(self, scores: StepScores) -> DecodeStep | None:
        """Chooses the next tokens.

        Args:
            scores: Scores of the last decoder call; of the first call those at the last position only.

        Returns:
            The next step, or None when all prompts are finished.
        """

    def results(self) -> list[GeneratedSequence]:
        """One sequence per prompt, in the order of the prompts."""


class TeacherForcing:
    """A `Search` that follows a given sequence of one prompt and records the logits at each of its positions."""

    def __init__(self, token_ids: Sequence[int], logits: Floats) -> None:
        """Prepares one pass.

        Args:
            token_ids: L tokens, at least two, from the decoder start token on.
            logits: `(L - 1, V)`, written to: row i gets the logits after the first i + 1 tokens.
        """
        self._token_ids = list(token_ids)
        self._logits = logits
        self._num_done = 0

    def start(self) -> Ids:
        return np.array([self._token_ids[:1]], dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        self._logits[self._num_done] = scores.logits(0, 0)
        self._num_done += 1
        if self._num_done == len(self._logits):
            return None
        only = np.zeros(1, dtype=np.int64)
        return DecodeStep(only, only, np.array([[self._token_ids[self._num_done]]], dtype=np.int64))

    def results(self) -> list[GeneratedSequence]:
        return [GeneratedSequence(tuple(self._token_ids), False)]


def initial_tokens(config: SearchConfig) -> list[int]:
    """The tokens that are known before the first decoder call: the start token and a forced first token.

    Feeding both in one call saves a decode step. Where the limit leaves room for a single token, the forced last token
    takes precedence over the forced first one, as in transformers.
    """
    forced = config.forced_bos_token_id
    suppressed = (*config.suppress_tokens, *config.begin_suppress_tokens)
    if forced is None or forced in (*config.end_tokens, *suppressed) or config.max_length <= 2:
        return [config.decoder_start_token_id]
    return [config.decoder_start_token_id, forced]


def unstarted(search: Search, reason: StopReason) -> GeneratedSequence:
    """The answer of a search of one prompt that was ended before its first decode step."""
    return GeneratedSequence(tuple(search.start()[0].tolist()), reason)


def new_scorer(config: SearchConfig) -> TokenScorer | None:
    """What scores the tokens of a search; None where the option `scores` does not ask for it."""
    return TokenScorer(config.location_ids) if config.scores else None


def constraint_of(config: SearchConfig) -> Constraint | None:
    """What limits the tokens of a search; None where the option `constrain` does not ask for it."""
    constraint: Constraint | None = config.constrain
    return constraint


def constrained_row(config: SearchConfig, tokens: Sequence[int]) -> ConstrainedRow | None:
    """The constraint of an answer that begins with some tokens, if there is one."""
    constraint = constraint_of(config)
    return None if constraint is None else ConstrainedRow(constraint, tokens, config.max_length)


def would_end(
    config: SearchConfig,
    constrained: ConstrainedRow | None,
    scores: StepScores,
    row: int,
    position: int,
    *,
    at_limit: bool,
) -> bool:
    """Whether an answer that ends here would end here without a token limit too.

    Args:
        config: How to search.
        constrained: The constraint of the answer, before its last token.
        scores: Those by which its last token is chosen.
        row: Of them.
        position: Of the row.
        at_limit: Whether the token is the last one that the limit leaves room for. `forced_eos_token_id` ends the answer there in
            any case, so what the model would have chosen freely tells whether the answer is complete.
    """
    if constrained is None:
        return not at_limit or scores.best_token(row, position) in config.end_tokens
    freely = constrained.allowed_without_limit()
    if not at_limit and len(freely) == len(constrained.allowed()):
        return True
    return scores.best_allowed_token(row, position, freely) in config.end_tokens
