"""Logits processors that read or change a whole row of scores `(V,)`, in the order and arithmetic of transformers 4.57.

They run where `SearchConfig.is_dense`: on the host, on a row that was copied or fetched from the device. Rows are float32, and
so is every operation, since torch rounds a Python number to the type of the tensor it meets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from florence_onnx.generation.logits_processors import LogitsProcessors, ends_with
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import Floats, Ids

Processor = Callable[[Sequence[int], Floats], Floats]
"""Of a row's tokens and its scores `(V,)`, which it may overwrite; returns the new scores."""
_MINUS_INFINITY = np.float32(-np.inf)


class DenseProcessors:
    """All processors of one prompt."""

    def __init__(
        self, config: SearchConfig, bans: LogitsProcessors, encoder_ids: Sequence[int], *, has_beams: bool = False
    ) -> None:
        """Sets up the processors that a configuration asks for.

        Args:
            config: How to search.
            bans: The banning and forcing ones of this prompt.
            encoder_ids: What the text encoder was fed, image tokens included.
            has_beams: Whether continuations of beams are chosen; then each must keep one token besides the end tokens.
        """
        self._bans = bans
        self._processors: list[Processor] = []
        add = self._processors.append
        self._of_first_beam: Processor | None = None
        self._allowed: Ids | None = None
        if config.sequence_bias:
            add(sequence_bias(config.sequence_bias))
        if config.encoder_repetition_penalty != 1:
            ids = np.unique(np.array(encoder_ids, dtype=np.int64))
            penalty = 1 / config.encoder_repetition_penalty
            self._of_first_beam = lambda tokens, scores: penalize(scores, ids[ids < len(scores)], penalty)
            add(self._of_first_beam)
        if config.repetition_penalty != 1:
            add(lambda tokens, scores: penalize(scores, np.array(sorted(set(tokens))), config.repetition_penalty))
        add(self._ban_and_force)
        if config.remove_invalid_values:
            add(lambda tokens, scores: remove_invalid_values(scores))
        if config.exponential_decay_length_penalty is not None:
            add(exponential_decay(*config.exponential_decay_length_penalty, config.end_tokens))
        if config.suppress_tokens or config.begin_suppress_tokens:
            add(self._suppress)
        if config.do_sample:
            least = len(config.end_tokens) + 1 if has_beams else 1
            for warp in warpers(config, least):
                add(_ignoring_tokens(warp))
        if config.renormalize_logits:
            add(lambda tokens, scores: log_softmax(scores))

    def __call__(self, tokens: Sequence[int], scores: Floats, *, beam: int = 0, allowed: Ids | None = None) -> Floats:
        """The scores of what may follow a row.

        Args:
            tokens: The row.
            scores: `(V,)`, overwritten: logits, or log-probabilities in beam search.
            beam: Index of the row among the beams of its prompt. transformers 4.57 applies `encoder_repetition_penalty` to the
                first beam only (it does not repeat the prompt for the others), and so do we.
            allowed: The only tokens that may follow unless one is forced, increasing; None for any.
        """
        is_limited = allowed is not None and not self.is_forced(len(tokens))
        own = scores[allowed] if is_limited else None
        self._allowed = allowed if is_limited else None
        for process in self._processors:
            if beam == 0 or process is not self._of_first_beam:
                scores = process(tokens, scores)
        # what comes after the bans may ban as well, or make minus infinity finite
        return scores if own is None or allowed is None else keep_only(scores, allowed, own)

    def is_forced(self, length: int) -> bool:
        """Whether what follows a row of `length` tokens is forced."""
        return bool(self._bans.all_forced(length))

    def _ban_and_force(self, tokens: Sequence[int], scores: Floats) -> Floats:
        if forced := self._bans.all_forced(len(tokens)):
            scores = np.full_like(scores, _MINUS_INFINITY)
            scores[list(forced)] = 0
            return scores
        own = None if self._allowed is None else scores[self._allowed]
        if banned := self._bans.banned_before_forcing(tokens):
            scores[banned] = _MINUS_INFINITY
        return scores if own is None or self._allowed is None else keep_only(scores, self._allowed, own)

    def _suppress(self, tokens: Sequence[int], scores: Floats) -> Floats:
        scores[self._bans.suppressed(len(tokens))] = _MINUS_INFINITY
        return scores


def keep_only(scores: Floats, allowed: Ids, own: Floats) -> Floats:
    """Sets all scores but some to minus infinity.

    Args:
        scores: `(V,)`.
        allowed: `(n,)`, the others.
        own: `(n,)`, their scores before some processors, which give way where they have banned all of them.
    """
    kept = scores[allowed]
    found = np.full_like(scores, _MINUS_INFINITY)
    found[allowed] = kept if np.isfinite(kept).any() else own
    return found


def _ignoring_tokens(warp: Callable[[Floats], Floats]) -> Processor:
    return lambda tokens, scores: warp(scores)


def penalize(scores: Floats, ids: Ids, penalty: float) -> Floats:
    """Lowers the scores of some tokens (raises them where `penalty` is below 1), whatever their sign."""
    chosen, factor = scores[ids], np.float32(penalty)
    scores[ids] = np.where(chosen < 0, chosen * factor, chosen / factor)
    return scores


def sequence_bias(biases: Sequence[tuple[tuple[int, ...], float]]) -> Processor:
    """Adds a number to the score of each token that completes a sequence."""
    single = {word[0]: np.float32(bias) for word, bias in biases if len(word) == 1}
    longer = [(word, np.float32(bias)) for word, bias in biases if len(word) > 1]

    def process(tokens: Sequence[int], scores: Floats) -> Floats:
        # summed before they are added, as in transformers: float32 sums depend on the order
        total = dict(single)
        for word, bias in longer:
            if ends_with(tokens, word):
                total[word[-1]] = total.get(word[-1], np.float32(0)) + bias
        for token, bias in total.items():
            scores[token] += bias
        return scores

    return process


def remove_invalid_values(scores: Floats) -> Floats:
    """Replaces NaN by 0 and infinities by the greatest and least finite numbers."""
    limits = np.finfo(np.float32)
    found: Floats = np.nan_to_num(scores, nan=0.0, posinf=limits.max, neginf=limits.min)
    return found


def exponential_decay(start: int, factor: float, end_tokens: Sequence[int]) -> Processor:
    """Raises the scores of the end tokens more and more, from `start` new tokens on."""

    def process(tokens: Sequence[int], scores: Floats) -> Floats:
        beyond = len(tokens) - start - 1
        if beyond > 0:
            try:
                growth = np.float32(factor**beyond - 1)
            except OverflowError:
                growth = np.float32(np.inf)
            ends = list(end_tokens)
            with np.errstate(invalid="ignore", over="ignore"):  # a banned end token becomes NaN, in transformers too
                scores[ends] += np.abs(scores[ends]) * growth
        return scores

    return process


# ----------------------------------------------------------------------------------------------------------- sampling


def warpers(config: SearchConfig, least: int) -> list[Callable[[Floats], Floats]]:
    """What limits a draw, in order.

    Args:
        config: How to search.
        least: Tokens that stay possible in any case.
    """
    found: list[Callable[[Floats], Floats]] = []
    if config.temperature != 1:
        found.append(lambda scores: scores / np.float32(config.temperature))
    if config.top_k:
        found.append(lambda scores: keep_top_k(scores, max(config.top_k, least)))
    if config.top_p < 1:
        found.append(lambda scores: keep_top_p(scores, config.top_p, least))
    if config.min_p > 0:
        found.append(lambda scores: keep_min_p(scores, config.min_p, least))
    if config.typical_p < 1:
        found.append(lambda scores: keep_typical(scores, config.typical_p, least))
    if 0 < config.epsilon_cutoff < 1:
        found.append(lambda scores: keep_above(scores, np.float32(config.epsilon_cutoff), least))
    if 0 < config.eta_cutoff < 1:
        found.append(lambda scores: keep_above(scores, eta(scores, config.eta_cutoff), least))
    return found


def keep_top_k(scores: Floats, count: int) -> Floats:
    """Keeps the `count` best tokens, and those that equal the last of them."""
    return np.where(scores < _nth_best(scores, count), _MINUS_INFINITY, scores)


def keep_top_p(scores: Floats, top_p: float, least: int) -> Floats:
    """Keeps the best tokens that together have probability `top_p`."""
    order = np.argsort(scores, kind="stable")
    is_dropped = _cumulative(softmax(scores[order])) <= np.float32(1 - top_p)
    is_dropped[len(order) - least :] = False
    scores[order[is_dropped]] = _MINUS_INFINITY
    return scores


def keep_min_p(scores: Floats, min_p: float, least: int) -> Floats:
    """Keeps tokens with at least `min_p` of the best one's probability."""
    probabilities = softmax(scores)
    is_dropped = probabilities < np.float32(min_p) * probabilities.max()
    is_dropped[np.argsort(-scores, kind="stable")[:least]] = False
    return np.where(is_dropped, _MINUS_INFINITY, scores)


def keep_typical(scores: Floats, mass: float, least: int) -> Floats:
    """Keeps the tokens whose information is nearest to its mean, together of probability `mass`."""
    normalized = log_softmax(scores)
    with np.errstate(invalid="ignore"):  # 0 * -inf
        entropy = -np.nansum(normalized * np.exp(normalized))
    distances = np.abs(-normalized - entropy)
    order = np.argsort(distances, kind="stable")
    last = min(int((_cumulative(softmax(scores[order])) < np.float32(mass)).sum()), len(scores) - 1)
    is_dropped = distances[order] > distances[order[last]]
    is_dropped[:least] = False
    scores[order[is_dropped]] = _MINUS_INFINITY
    return scores


def keep_above(scores: Floats, limit: np.float32, least: int) -> Floats:
    """Keeps tokens of at least some probability."""
    is_dropped = (softmax(scores) < limit) & (scores < _nth_best(scores, least))
    return np.where(is_dropped, _MINUS_INFINITY, scores)


def eta(scores: Floats, epsilon: float) -> np.float32:
    """The least probability of eta sampling: lower where the distribution is flat."""
    log_probs = log_softmax(scores)
    entropy = -(np.exp(log_probs) * np.maximum(log_probs, np.finfo(np.float32).min)).sum()
    chosen = np.float32(epsilon)
    return min(chosen, np.float32(np.sqrt(chosen) * np.exp(-entropy)))


def softmax(scores: Floats) -> Floats:
    """Probabilities `(V,)`."""
    found: Floats = np.exp(scores - scores.max())
    found /= found.sum()
    return found


def log_softmax(scores: Floats) -> Floats:
    """Log-probabilities `(V,)`."""
    found: Floats = scores - scores.max()
    found -= np.log(np.exp(found).sum())
    return found


def _cumulative(probabilities: Floats) -> Floats:
    # torch sums up in double and rounds each sum
    return np.cumsum(probabilities, dtype=np.float64).astype(np.float32)


def _nth_best(scores: Floats, count: int) -> np.float32:
    place = max(len(scores) - count, 0)
    found: np.float32 = np.partition(scores, place)[place]
    return found
