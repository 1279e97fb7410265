"""Beam search as transformers does it, without looking at every score of every beam."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.scores import LogProbs, StepScores
from florence_onnx.generation.search import Continuation, Floats, GeneratedSequence, Ids, opening

_UNREACHABLE = np.float32(-1.0e9)
"""Score of a beam that must not be chosen, as in transformers; finite, so that sums stay comparable."""


@dataclass(frozen=True)
class _Hypothesis:
    token_ids: tuple[int, ...]
    score: np.float32
    finished: bool
    truncated: bool


class _BeamState:
    """The beams of one prompt: K running rows and the K best finished hypotheses."""

    def __init__(self, config: SearchConfig) -> None:
        k = config.num_beams
        self._config = config
        self.rows = [opening(config) for _ in range(k)]
        self.processors = LogitsProcessors(config, self.rows[0])
        self.scores: Floats = np.full(k, _UNREACHABLE, dtype=np.float32)
        self.scores[0] = 0  # all beams start alike: only the first may branch
        self.best = [_Hypothesis((), _UNREACHABLE, False, False)] * k
        self._can_improve = True

    @property
    def length(self) -> int:
        """Tokens of every running row."""
        return len(self.rows[0])

    def process(self, log_probs: LogProbs, first_row: int, width: int) -> None:
        """Applies the logits processors to the first `width` beams, whose rows of scores start at `first_row`."""
        forced = self.processors.forced(self.length)
        for place, tokens in enumerate(self.rows[:width]):
            if forced is not None:
                log_probs.force(first_row + place, forced)
            elif banned := self.processors.banned(tokens):
                log_probs.ban(first_row + place, banned)

    def advance(self, scores: Floats, parents: Ids, tokens: Ids, ends: npt.NDArray[np.bool_]) -> tuple[Ids, Ids] | None:
        """Extends the beams by one token.

        Args:
            scores: `(2K,)` of the best continuations, best first.
            parents: `(2K,)` the beams that they continue.
            tokens: `(2K,)` the tokens that they add.
            ends: `(K,)` whether the model itself would end the beam now (asked only at the token limit).

        Returns:
            Parent beam and token of every next beam, both `(K,)`, or None when the search is over.
        """
        k = self._config.num_beams
        at_limit = self.length + 1 >= self._config.max_length
        stops = (tokens == self._config.eos_token_id) | at_limit
        self._finish(scores, parents, tokens, stops, at_limit & ~ends)
        scores = scores + stops * _UNREACHABLE
        following = np.argsort(-scores, kind="stable")[:k]
        self.scores, parents, tokens = scores[following], parents[following], tokens[following]
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        self.rows = [[*self.rows[parent], token] for parent, token in pairs]
        if stops.all() or not self._goes_on():
            return None
        for row in self.rows:
            self.processors.add(row)
        return parents, tokens

    def _finish(
        self, scores: Floats, parents: Ids, tokens: Ids, stops: npt.NDArray[np.bool_], cut: npt.NDArray[np.bool_]
    ) -> None:
        """Lets candidates among the first K that stop compete with the finished hypotheses; `cut` is per parent."""
        k = self._config.num_beams
        closed = not self._can_improve or (self._config.early_stopping is True and self._is_full)
        if closed or not stops[:k].any():
            return
        normed = scores / np.float32(self.length**self._config.length_penalty)
        for rank in np.flatnonzero(stops[:k]):
            sequence = (*self.rows[parents[rank]], int(tokens[rank]))
            self.best.append(_Hypothesis(sequence, normed[rank], True, bool(cut[parents[rank]])))
        self.best = sorted(self.best, key=lambda hypothesis: -hypothesis.score)[:k]

    @property
    def _is_full(self) -> bool:
        return all(hypothesis.finished for hypothesis in self.best)

    def _goes_on(self) -> bool:
        """Whether a running beam may still beat what is finished, by transformers' rules."""
        config = self._config
        if config.early_stopping is True and self._is_full:
            return False
        to_the_end = config.early_stopping == "never" and config.length_penalty > 0
        length = (config.max_length if to_the_end else self.length) - 1
        reachable = self.scores[0] / np.float32(length**config.length_penalty)
        worst = self.best[-1].score
        self._can_improve &= any(
            bool(reachable > (worst if hypothesis.finished else _UNREACHABLE)) for hypothesis in self.best
        )
        return self._can_improve


class BeamSearch:
    """Keeps the `num_beams` most probable beginnings of every prompt."""

    def __init__(self, num_prompts: int, config: SearchConfig) -> None:
        self._config = config
        self._states = [_BeamState(config) for _ in range(num_prompts)]
        self._active = list(self._states)
        self._is_started = False

    def start(self) -> Ids:
        return np.array([state.rows[0] for state in self._states], dtype=np.int64)

    def advance(self, scores: StepScores) -> Continuation | None:
        k = self._config.num_beams
        width = k if self._is_started else 1  # the opening is fed once per prompt: its beams are all alike
        ends = self._model_ends(scores, len(self._active) * width)
        log_probs = scores.log_probs(2 * k)
        rows: list[Ids] = []
        tokens: list[Ids] = []
        kept: list[int] = []
        for place, state in enumerate(self._active):
            first_row = place * width
            state.process(log_probs, first_row, width)
            best = log_probs.best(first_row, state.scores, 2 * k, is_shared=width < k)
            own_ends = np.resize(ends[first_row : first_row + width], k)
            step = state.advance(*best, own_ends)
            if step is not None:
                rows.append(first_row + np.minimum(step[0], width - 1))
                tokens.append(step[1])
                kept.append(place)
        self._is_started = True
        self._active = [self._active[place] for place in kept]
        if not kept:
            return None
        return Continuation(np.concatenate(rows), np.array(kept), np.concatenate(tokens)[:, None])

    def _model_ends(self, scores: StepScores, num_rows: int) -> npt.NDArray[np.bool_]:
        """Whether each row would end now of its own accord; asked only where the limit is about to end it."""
        ends = np.zeros(num_rows, dtype=bool)
        if self._active[0].length + 1 >= self._config.max_length:
            last = scores.num_tokens - 1
            ends[:] = [scores.best_token(row, last) == self._config.eos_token_id for row in range(num_rows)]
        return ends

    def results(self) -> list[GeneratedSequence]:
        best = [state.best[0] for state in self._states]
        return [GeneratedSequence(hypothesis.token_ids, hypothesis.truncated) for hypothesis in best]
