"""How sure the model is of the tokens that a search chose, before any logits processor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

NEAR = 2
"""Bins on either side that count as near a coordinate."""


@dataclass(frozen=True)
class TokenScores:
    """Of each token of an answer, aligned with its ids."""

    log_probs: tuple[float, ...] = ()
    """Natural logarithms of the model's probabilities. 0 for the start token and a forced first token, which are given."""
    near: tuple[float, ...] = ()
    """For a location token the probability of its bin and `NEAR` bins on either side; NaN for other tokens. On a device only
    the 32 best tokens are summed, unless all were fetched."""
    num_given: int = 0
    """How many tokens at the beginning were given."""

    def plus(self, log_prob: float, near: float) -> TokenScores:
        """The scores of an answer that is one token longer."""
        return TokenScores((*self.log_probs, log_prob), (*self.near, near), self.num_given)


class TokenDistribution(Protocol):
    """The model's distribution of the next token of one row. Valid until the next decoder call."""

    def log_prob(self, token: int) -> float:
        """Log-probability of a token that a search may choose."""

    def probability(self, first: int, last: int) -> float:
        """Sum of the probabilities of the tokens `first` to `last`."""


class WholeDistribution:
    """A distribution of which all logits are known."""

    def __init__(
        self, logits: npt.NDArray[np.float32], log_sum: float | None = None, changed: Mapping[int, float] | None = None
    ) -> None:
        """Args:
        logits: `(V,)`.
        log_sum: Logarithm of the sum of their exponentials; None computes it.
        changed: Logits by token where those of the model were overwritten in `logits`.
        """
        self._logits = logits
        if log_sum is None:
            greatest = logits.max()
            log_sum = float(greatest) + math.log(float(np.exp(logits - greatest).sum()))
        self._log_sum = log_sum
        self._changed = changed or {}

    def log_prob(self, token: int) -> float:
        return float(self._changed.get(token, self._logits[token])) - self._log_sum

    def probability(self, first: int, last: int) -> float:
        if self._changed:
            return sum(math.exp(self.log_prob(token)) for token in range(first, last + 1))
        return float(np.exp(self._logits[first : last + 1] - np.float32(self._log_sum)).sum())


class ListedDistribution:
    """A distribution of which the top-k are known."""

    def __init__(self, logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], log_sum: float) -> None:
        """Args:
        logits: `(k,)`, the greatest.
        ids: `(k,)`, their tokens.
        log_sum: Logarithm of the sum of the exponentials of all logits.
        """
        self._log_probs = {token: logit - log_sum for token, logit in zip(ids.tolist(), logits.tolist(), strict=True)}
        self._least = min(self._log_probs.values())

    def log_prob(self, token: int) -> float:
        return float(self._log_probs.get(token, self._least))

    def probability(self, first: int, last: int) -> float:
        return sum(math.exp(self._log_probs[each]) for each in range(first, last + 1) if each in self._log_probs)


class TokenScorer:
    """Scores chosen tokens; knows which tokens are locations."""

    def __init__(self, location_ids: range | None) -> None:
        """Args:
        location_ids: Ids of `<loc_0>` to `<loc_999>`; None where the vocabulary has none.
        """
        self._location_ids = location_ids or range(0)

    def start(self, given: Sequence[int]) -> TokenScores:
        """The scores of tokens that are known before the first decoder call."""
        return TokenScores((0.0,) * len(given), (math.nan,) * len(given), len(given))

    def extend(self, scores: TokenScores, distribution: TokenDistribution, token: int) -> TokenScores:
        """The scores of an answer that was continued with a token."""
        ids = self._location_ids
        near = math.nan
        if token in ids:
            near = distribution.probability(max(ids[0], token - NEAR), min(ids[-1], token + NEAR))
        return scores.plus(distribution.log_prob(token), near)
