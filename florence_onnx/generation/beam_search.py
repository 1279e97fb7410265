"""Beam search with the results of transformers 4.57, without sorting every score of every beam."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import LogProbs, StepScores
from florence_onnx.generation.search import DecodeStep, Floats, GeneratedSequence, Ids, initial_tokens

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


class _BeamState:
    """The K = `num_beams` running beams of one prompt and its K best finished hypotheses."""

    def __init__(self, config: SearchConfig) -> None:
        k = config.num_beams
        self._config = config
        self.rows = [initial_tokens(config) for _ in range(k)]
        self.processors = LogitsProcessors(config, self.rows[0])
        # all beams start with the same tokens; if more than one could be extended, all would stay the same
        self.scores: Floats = np.full(k, _UNREACHABLE, dtype=np.float32)
        self.scores[0] = 0
        self.best = [_Hypothesis((), _UNREACHABLE, False, False)] * k
        self._can_improve = True

    @property
    def length(self) -> int:
        """Number of tokens in every running beam."""
        return len(self.rows[0])

    def process(self, log_probs: LogProbs, first_row: int, num_rows: int) -> None:
        """Applies the logits processors to the first `num_rows` beams, whose scores start at row `first_row`."""
        forced = self.processors.forced(self.length)
        for beam, tokens in enumerate(self.rows[:num_rows]):
            if forced is not None:
                log_probs.force(first_row + beam, forced)
            elif banned := self.processors.banned(tokens):
                log_probs.ban(first_row + beam, banned)

    def advance(
        self, scores: Floats, parents: Ids, tokens: Ids, would_end: npt.NDArray[np.bool_]
    ) -> tuple[Ids, Ids] | None:
        """Extends the beams by one token.

        Args:
            scores: `(2K,)`, scores of the best continuations, best first. With 2K of them at least K remain, even if
                every beam has the end token among its best.
            parents: `(2K,)`, the beams that they extend.
            tokens: `(2K,)`, the tokens that they append.
            would_end: `(K,)`, whether the model would end each beam here unforced (known at the token limit only).

        Returns:
            Parent beam and token of each next beam, both `(K,)`, or None when the search is finished.
        """
        k = self._config.num_beams
        at_limit = self.length + 1 >= self._config.max_length
        stops = (tokens == self._config.eos_token_id) | at_limit
        self._finish(scores, parents, tokens, stops, at_limit & ~would_end)
        scores = scores + stops * _UNREACHABLE
        following = np.argsort(-scores, kind="stable")[:k]
        self.scores, parents, tokens = scores[following], parents[following], tokens[following]
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        self.rows = [[*self.rows[parent], token] for parent, token in pairs]
        if stops.all() or not self._may_continue():
            return None
        for row in self.rows:
            self.processors.add(row)
        return parents, tokens

    def _finish(
        self, scores: Floats, parents: Ids, tokens: Ids, stops: npt.NDArray[np.bool_], is_cut: npt.NDArray[np.bool_]
    ) -> None:
        """Merges continuations that stop into the finished hypotheses (transformers' `_update_finished_beams`).

        Only the first K continuations can finish; the other K are spares to keep K beams running.

        Args:
            scores: As for `advance`, like `parents` and `tokens`.
            parents: See `scores`.
            tokens: See `scores`.
            stops: `(2K,)`, whether a continuation ends its beam.
            is_cut: `(K,)`, whether the token limit would cut a beam off.
        """
        k = self._config.num_beams
        is_closed = not self._can_improve or (self._config.early_stopping is True and self._is_full)
        if is_closed or not stops[:k].any():
            return
        normed = scores / np.float32(self.length**self._config.length_penalty)
        for rank in np.flatnonzero(stops[:k]):
            sequence = (*self.rows[parents[rank]], int(tokens[rank]))
            self.best.append(_Hypothesis(sequence, normed[rank], True, bool(is_cut[parents[rank]])))
        self.best = sorted(self.best, key=lambda hypothesis: -hypothesis.score)[:k]

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


class BeamSearch:
    """Keeps the `num_beams` most probable partial answers of every prompt."""

    def __init__(self, num_prompts: int, config: SearchConfig) -> None:
        self._config = config
        self._states = [_BeamState(config) for _ in range(num_prompts)]
        self._active = list(self._states)
        self._has_branched = False

    def start(self) -> Ids:
        return np.array([state.rows[0] for state in self._states], dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        k = self._config.num_beams
        # The first call is fed one row per prompt, since its beams are still the same: all of them read that row. From
        # the second call on there are K rows per prompt.
        width = k if self._has_branched else 1
        would_end = self._would_end(scores, len(self._active) * width)
        log_probs = scores.log_probs(2 * k)
        rows: list[Ids] = []
        tokens: list[Ids] = []
        staying: list[int] = []
        for index, state in enumerate(self._active):
            first_row = index * width
            state.process(log_probs, first_row, width)
            continuations = log_probs.top_k(first_row, state.scores, 2 * k, is_shared=width < k)
            step = state.advance(*continuations, np.resize(would_end[first_row : first_row + width], k))
            if step is not None:
                rows.append(first_row + np.minimum(step[0], width - 1))
                tokens.append(step[1])
                staying.append(index)
        self._has_branched = True
        self._active = [self._active[index] for index in staying]
        if not staying:
            return None
        return DecodeStep(np.concatenate(rows), np.array(staying), np.concatenate(tokens)[:, None])

    def _would_end(self, scores: StepScores, num_rows: int) -> npt.NDArray[np.bool_]:
        """Whether the model itself would end each row now; looked up only where the token limit is about to end it."""
        would_end = np.zeros(num_rows, dtype=bool)
        if self._active[0].length + 1 >= self._config.max_length:
            last = scores.num_tokens - 1
            would_end[:] = [scores.best_token(row, last) == self._config.eos_token_id for row in range(num_rows)]
        return would_end

    def results(self) -> list[GeneratedSequence]:
        best = [state.best[0] for state in self._states]
        return [GeneratedSequence(hypothesis.token_ids, hypothesis.is_truncated) for hypothesis in best]
