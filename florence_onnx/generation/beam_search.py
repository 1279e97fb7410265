"""Beam search with the results of transformers 4.57, without sorting every score of every beam."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.constraints import without
from florence_onnx.generation.dense_processors import DenseProcessors, log_softmax
from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress, StopReason
from florence_onnx.generation.sampling import draw_without_replacement, new_generator
from florence_onnx.generation.scores import LogProbs, StepScores, sort_top_k
from florence_onnx.generation.search import (
    DecodeStep,
    Floats,
    GeneratedSequence,
    Ids,
    constraint_of,
    initial_tokens,
    new_scorer,
)
from florence_onnx.generation.token_scores import TokenDistribution, TokenScores

_UNREACHABLE = np.float32(-1.0e9)
"""Score of a beam that must not be chosen, as in transformers. Not -inf: differences and sums of it stay finite."""


@dataclass(frozen=True)
class _Hypothesis:
    """A finished sequence of a prompt, or a free slot for one (`is_finished` is False)."""

    token_ids: tuple[int, ...]
    score: np.float32
    """Sum of log-probabilities / length ** length_penalty."""
    is_finished: bool
    is_truncated: bool
    token_scores: TokenScores | None = None
    is_possible: bool = True
    """Whether it grew from continuations that were possible; a constraint may leave fewer of those than beams."""


class _BeamState:
    """The K = `num_beams` running beams of one prompt and its K best finished hypotheses."""

    def __init__(self, config: SearchConfig, encoder_ids: Sequence[int] = (), progress: Progress | None = None) -> None:
        self._progress = progress
        self._stopped: StopReason | None = None
        k = config.num_beams
        self._config = config
        self._end_tokens = config.end_tokens
        # As many as keep K beams running, even if every beam has all end tokens among its best.
        self.num_candidates = max(2, 1 + len(self._end_tokens)) * k
        self.rows = [initial_tokens(config) for _ in range(k)]
        self.processors = LogitsProcessors(config, self.rows[0], encoder_ids)
        self._dense: DenseProcessors | None = None
        if config.is_dense:
            self._dense = DenseProcessors(config, self.processors, encoder_ids, has_beams=True)
        self._random = new_generator(config.seed, 0) if config.do_sample else None
        # all beams start with the same tokens; if more than one could be extended, all would stay the same
        self.scores: Floats = np.full(k, _UNREACHABLE, dtype=np.float32)
        self.scores[0] = 0
        self.best = [_Hypothesis((), _UNREACHABLE, False, False)] * k
        self._can_improve = True
        self._constraint = constraint_of(config)
        # the constraint's state after each beam
        self._limits = [] if self._constraint is None else [self._constraint.start(self.rows[0])] * k
        self._scorer = new_scorer(config)
        self._token_scores = [None if self._scorer is None else self._scorer.start(self.rows[0])] * k

    @property
    def length(self) -> int:
        """Number of tokens in every running beam."""
        return len(self.rows[0])

    def continuations(
        self, scores: StepScores, log_probs: LogProbs | None, first_row: int, num_rows: int
    ) -> tuple[Floats, Ids, Ids]:
        """Chooses the candidates that `advance` takes: the best ones, or drawn ones.

        Args:
            scores: Of the decoder call.
            log_probs: Made of `scores`; None where processors need whole rows.
            first_row: Row of the first beam.
            num_rows: 1 before the beams have branched: all read the same row; K after that.
        """
        k = self._config.num_beams
        if log_probs is not None:
            self._process(log_probs, first_row, num_rows)
            return log_probs.top_k(first_row, self.scores, self.num_candidates, is_shared=num_rows < k)
        rows = [self._dense_row(scores, first_row + beam, beam) for beam in range(num_rows)]
        vocab = len(rows[0])
        totals = (np.stack(rows) + self.scores[:, None]).ravel()  # a single row is added to the score of each beam
        if self._random is not None:
            keys = draw_without_replacement(self._random, totals, self.num_candidates)
            return totals[keys], keys // vocab, keys % vocab
        count = min(self.num_candidates, len(totals))
        # NaN counts as the greatest, as in torch
        order = np.where(np.isnan(totals), np.float32(np.inf), totals)
        threshold = np.partition(order, len(order) - count)[len(order) - count]
        keys = np.flatnonzero(order >= threshold)
        return sort_top_k(totals[keys], keys, count, vocab)

    def _dense_row(self, scores: StepScores, row: int, beam: int) -> Floats:
        assert self._dense is not None, "rows are read for dense processors only"
        logits = scores.logits(row, scores.num_tokens - 1)
        return self._dense(self.rows[beam], log_softmax(logits), beam=beam, allowed=self._allowed(beam))

    def _allowed(self, beam: int) -> Ids | None:
        """The tokens that a constraint allows after a beam; None for any."""
        if self._constraint is None:
            return None
        if self.scores[beam] < _UNREACHABLE / 2 and self._is_impossible(beam):
            return np.array(sorted(self._end_tokens))
        return self._constraint.allowed(self._limits[beam], self._config.max_length - self.length)

    def _is_impossible(self, beam: int) -> bool:
        """Whether a beam only fills up, with a token that was not allowed or behind its end: nobody need say what follows."""
        return bool(self.scores[beam] == -np.inf) or not set(self._end_tokens).isdisjoint(self.rows[beam][1:])

    def _process(self, log_probs: LogProbs, first_row: int, num_rows: int) -> None:
        """Applies the logits processors to the first `num_rows` beams, whose scores start at row `first_row`."""
        forced = self.processors.forced(self.length)
        for beam, tokens in enumerate(self.rows[:num_rows]):
            if forced is not None:
                log_probs.force(first_row + beam, forced)
                continue
            banned = self.processors.banned(tokens)
            allowed = self._allowed(beam)
            if allowed is not None:
                log_probs.allow(first_row + beam, without(allowed, banned))
            elif banned:
                log_probs.ban(first_row + beam, banned)

    def would_end(self, scores: StepScores, first_row: int, num_rows: int) -> list[bool]:
        """Whether the model itself would end each beam here, without a token limit; True where the limit is not near.

        Args:
            scores: See `continuations`, like the others. Not changed by log-probabilities that were made of them yet.
            first_row: See `scores`.
            num_rows: See `scores`.
        """
        last = scores.num_tokens - 1
        at_limit = self.length + 1 >= self._config.max_length
        if self._constraint is None and not at_limit:
            return [True] * num_rows
        found = []
        for beam in range(num_rows):
            limited, freely = self._allowed(beam), None
            if self._constraint is not None and limited is not None:
                freely = self._constraint.allowed(self._limits[beam], None)
            row = first_row + beam
            if freely is None or limited is None:
                best = scores.best_token(row, last)
            elif at_limit or len(limited) < len(freely):
                best = scores.best_allowed_token(row, last, freely)
            else:
                best = self._end_tokens[0]
            found.append(best in self._end_tokens)
        return found

    def advance(
        self,
        scores: Floats,
        parents: Ids,
        tokens: Ids,
        would_end: npt.NDArray[np.bool_],
        distribution: Callable[[int], TokenDistribution],
    ) -> tuple[Ids, Ids] | None:
        """Extends the beams by one token.

        Args:
            scores: `(C,)`, scores of `num_candidates` continuations: the best, best first, or those drawn, in their order.
            parents: `(C,)`, the beams that they extend.
            tokens: `(C,)`, the tokens that they append.
            would_end: `(K,)`, whether the model would end each beam here if there were no token limit; True away from it.
            distribution: Returns the model's distribution after a beam.

        Returns:
            Parent beam and token of each next beam, both `(K,)`, or None when the search is finished.
        """
        k = self._config.num_beams
        at_limit = self.length + 1 >= self._config.max_length
        stops = (tokens == self._end_tokens[0]) | at_limit
        for token in self._end_tokens[1:]:
            stops |= tokens == token
        token_scores = self._score(parents, tokens, distribution)
        self._finish(scores, parents, tokens, stops, ~would_end, token_scores)
        scores = scores + stops * _UNREACHABLE
        following = np.argsort(-scores, kind="stable")[:k]
        self.scores, parents, tokens = scores[following], parents[following], tokens[following]
        pairs = list(zip(parents.tolist(), tokens.tolist(), strict=True))
        self.rows = [[*self.rows[parent], token] for parent, token in pairs]
        if self._constraint is not None:
            self._limits = [self._constraint.extend(self._limits[parent], token) for parent, token in pairs]
        self._token_scores = [token_scores[rank] for rank in following]
        if stops.all() or not self._may_continue():
            return None
        if self._progress is not None and (reason := self._progress.after_step(self._certain)):
            self._stop(reason)
            return None
        for row in self.rows:
            self.processors.add(row)
        return parents, tokens

    def _certain(self) -> list[int]:
        """The tokens with which every possible answer begins.

        The answer will be the best finished hypothesis of now, or what becomes of a running beam.
        """
        best = self.best[0]
        return common_prefix([*self.rows, best.token_ids] if best.is_finished else self.rows)

    def _stop(self, reason: StopReason) -> None:
        """Counts the running beams as finished, as transformers does when its `max_time` is over."""
        self._stopped = reason
        normed = self.scores / np.float32((self.length - 1) ** self._config.length_penalty)
        for beam in np.flatnonzero(self.scores > _UNREACHABLE / 2).tolist():
            row = tuple(self.rows[beam])
            self.best.append(_Hypothesis(row, normed[beam], True, True, self._token_scores[beam]))
        self.best = sorted(self.best, key=lambda hypothesis: -hypothesis.score)[: self._config.num_beams]

    def _score(
        self, parents: Ids, tokens: Ids, distribution: Callable[[int], TokenDistribution]
    ) -> list[TokenScores | None]:
        """The token scores of each continuation."""
        if self._scorer is None:
            return [None] * len(tokens)
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        found: list[TokenScores | None] = []
        for parent, token in pairs:
            before = self._token_scores[parent]
            assert before is not None, "every beam is scored where one is"
            found.append(self._scorer.extend(before, distribution(parent), token))
        return found

    def _finish(
        self,
        scores: Floats,
        parents: Ids,
        tokens: Ids,
        stops: npt.NDArray[np.bool_],
        is_cut: npt.NDArray[np.bool_],
        token_scores: Sequence[TokenScores | None],
    ) -> None:
        """Merges continuations that stop into the finished hypotheses (transformers' `_update_finished_beams`).

        Only the first K continuations can finish; the others are spares to keep K beams running.

        Args:
            scores: As for `advance`, like `parents` and `tokens`.
            parents: See `scores`.
            tokens: See `scores`.
            stops: `(C,)`, whether a continuation ends its beam.
            is_cut: `(K,)`, whether the token limit cuts a beam off.
            token_scores: Of each continuation.
        """
        k = self._config.num_beams
        is_closed = not self._can_improve or (self._config.early_stopping is True and self._is_full)
        if is_closed or not stops[:k].any():
            return
        normed = scores / np.float32(self.length**self._config.length_penalty)
        for rank in np.flatnonzero(stops[:k]).tolist():
            sequence = (*self.rows[parents[rank]], int(tokens[rank]))
            is_truncated = bool(is_cut[parents[rank]])
            is_possible = bool(scores[rank] > _UNREACHABLE / 2)
            self.best.append(_Hypothesis(sequence, normed[rank], True, is_truncated, token_scores[rank], is_possible))
        self.best = sorted(self.best, key=lambda hypothesis: -hypothesis.score)[:k]

    def result(self) -> GeneratedSequence:
        """The best finished hypothesis, and as many others as are asked for."""
        wanted = [each for each in self.best[: self._config.num_return_sequences] if each.is_finished]
        if self._constraint is not None:
            wanted = [each for each in wanted if each.is_possible]
        found = [
            GeneratedSequence(each.token_ids, self._stopped or each.is_truncated, scores=each.token_scores)
            for each in wanted
        ]
        if not found:  # settings that contradict each other left nothing possible
            return GeneratedSequence(tuple(self.rows[0]), self._stopped or True, scores=self._token_scores[0])
        return replace(found[0], alternatives=tuple(found[1:]))

    @property
    def _is_full(self) -> bool:
        return all(hypothesis.is_finished for hypothesis in self.best)

    def _may_continue(self) -> bool:
        """Whether a running beam may still beat a finished hypothesis (transformers' `_check_early_stop_heuristic`)."""
        config = self._config
        if config.early_stopping is True and self._is_full:
            return False
        # A positive penalty rewards length, so the best a beam can reach is its present sum over the greatest length.
        # Other values of `early_stopping` assume the present length, which is a heuristic and not a bound.
        at_full_length = config.early_stopping == "never" and config.length_penalty > 0
        length = (config.max_length if at_full_length else self.length) - 1
        reachable = self.scores[0] / np.float32(length**config.length_penalty)
        worst = self.best[-1].score
        self._can_improve &= any(
            bool(reachable > (worst if hypothesis.is_finished else _UNREACHABLE)) for hypothesis in self.best
        )
        return self._can_improve


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The tokens with which all rows begin."""
    prefix: list[int] = []
    for tokens in zip(*rows, strict=False):
        if any(token != tokens[0] for token in tokens):
            break
        prefix.append(tokens[0])
    return prefix


def _distributions(
    scores: StepScores, log_probs: LogProbs | None, first_row: int, num_rows: int
) -> Callable[[int], TokenDistribution]:
    """The distribution after each beam of a prompt whose rows start at `first_row`, computed when it is asked for."""

    @functools.cache
    def of_row(row: int) -> TokenDistribution:
        # `log_probs` overwrites the logits that it was made of
        return scores.distribution(row, scores.num_tokens - 1) if log_probs is None else log_probs.distribution(row)

    return lambda beam: of_row(first_row + min(beam, num_rows - 1))


class BeamSearch:
    """Keeps the `num_beams` most probable partial answers of every prompt."""

    def __init__(
        self,
        num_prompts: int,
        config: SearchConfig,
        encoder_ids: Sequence[Sequence[int]] | None = None,
        progress: Sequence[Progress] | None = None,
    ) -> None:
        """Args:
        num_prompts: Number of prompts.
        config: How to search.
        encoder_ids: For each prompt the token ids that the text encoder was fed.
        progress: As for `generate.new_search`.
        """
        self._config = config
        self._is_dense = config.is_dense
        ids: Sequence[Sequence[int]] = encoder_ids if encoder_ids is not None else [()] * num_prompts
        follow: Sequence[Progress | None] = progress if progress is not None else [None] * num_prompts
        self._states = [_BeamState(config, ids[index], follow[index]) for index in range(num_prompts)]
        self._active = list(self._states)
        self._has_branched = False

    def start(self) -> Ids:
        return np.array([state.rows[0] for state in self._states], dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        k = self._config.num_beams
        # The first call is fed one row per prompt, since its beams are still the same: all of them read that row. From
        # the second call on there are K rows per prompt.
        width = k if self._has_branched else 1
        would_end = [state.would_end(scores, n * width, width) for n, state in enumerate(self._active)]
        log_probs = None if self._is_dense else scores.log_probs(self._active[0].num_candidates)
        rows: list[Ids] = []
        tokens: list[Ids] = []
        staying: list[int] = []
        for index, state in enumerate(self._active):
            first_row = index * width
            continuations = state.continuations(scores, log_probs, first_row, width)
            step = state.advance(
                *continuations,
                np.resize(would_end[index], k),
                _distributions(scores, log_probs, first_row, width),
            )
            if step is not None:
                rows.append(first_row + np.minimum(step[0], width - 1))
                tokens.append(step[1])
                staying.append(index)
        self._has_branched = True
        self._active = [self._active[index] for index in staying]
        if not staying:
            return None
        return DecodeStep(np.concatenate(rows), np.array(staying), np.concatenate(tokens)[:, None])

    def results(self) -> list[GeneratedSequence]:
        return [state.result() for state in self._states]
