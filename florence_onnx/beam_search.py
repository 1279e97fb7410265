"""Beam search as transformers does it, without looking at every score of every beam."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from florence_onnx.logits_processors import LogitsProcessors
from florence_onnx.options import SearchConfig
from florence_onnx.search import Continuation, Floats, GeneratedSequence, Ids, opening

BLOCK = 128
"""Tokens whose greatest score is found first; only the blocks that can hold a candidate are looked at again."""

_UNREACHABLE = np.float32(-1.0e9)
"""Score of a beam that must not be chosen, as in transformers; finite, so that sums stay comparable."""


class BlockedLogProbs:
    """Log-probabilities of some rows, with the greatest of every block, in buffers that are reused.

    A block is every n-th token, so that the maxima of all n blocks are elementwise maxima of `BLOCK` vectors. The
    tokens left over form a tail that is always looked at.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._scratch: Floats = np.zeros((0, 0), dtype=np.float32)

    def read(self, logits: Floats) -> None:
        """Args: logits `(R, V)`, float32; taken over and overwritten."""
        if self._scratch.shape != logits.shape:
            self._scratch = np.empty(logits.shape, dtype=np.float32)
        num_blocks = logits.shape[1] // self._block
        blocked = num_blocks * self._block
        self._values = logits
        self._blocks = logits[:, :blocked].reshape(len(logits), self._block, num_blocks)
        self._tail = logits[:, blocked:]
        self._maxima: Floats = self._blocks.max(axis=1)
        greatest = np.max(self._maxima, axis=1, initial=-np.inf)
        greatest = np.maximum(greatest, np.max(self._tail, axis=1, initial=-np.inf))[:, None]
        self._values -= greatest
        self._maxima -= greatest
        np.exp(self._values, out=self._scratch)
        # what is left to subtract; doing so candidate by candidate rounds as doing so for all would
        self._log_sums: Floats = np.log(self._scratch.sum(axis=1, keepdims=True))

    def ban(self, row: int, tokens: Sequence[int]) -> None:
        """Makes tokens of a row impossible."""
        for token in tokens:
            self._values[row, token] = -np.inf
            if token < self._blocks[0].size:
                block = token % self._maxima.shape[1]
                self._maxima[row, block] = self._blocks[row, :, block].max()

    def force(self, row: int, token: int) -> None:
        """Makes a token of a row certain and all others impossible."""
        self._values[row] = self._maxima[row] = -np.inf
        self._values[row, token] = self._log_sums[row] = 0
        if token < self._blocks[0].size:
            self._maxima[row, token % self._maxima.shape[1]] = 0

    def best(self, first_row: int, scores: Floats, k: int, *, is_shared: bool) -> tuple[Floats, Ids, Ids]:
        """The k best continuations of some beams, the lower beam and token first among equals.

        Args:
            first_row: Row of the first beam.
            scores: `(K,)` of the beams so far; their rows follow each other.
            k: How many; at most the number of all continuations.
            is_shared: Whether all beams read the first row.

        Returns:
            Score, beam and token of each, `(k,)`.
        """
        rows = np.full(len(scores), first_row) if is_shared else np.arange(first_row, first_row + len(scores))
        beam, log_sum = scores[:, None], self._log_sums[rows]
        maxima = (self._maxima[rows] - log_sum) + beam
        # each of the k best blocks holds a token with its score, so no token below the k-th of them is among the k best
        least = np.partition(maxima, maxima.size - k, axis=None)[maxima.size - k] if maxima.size > k else -np.inf
        beams, blocks = np.nonzero(maxima >= least)
        inside = (self._blocks[rows[beams], :, blocks] - log_sum[beams]) + beam[beams]
        tail = (self._tail[rows] - log_sum) + beam
        vocab, num_blocks = self._values.shape[1], self._maxima.shape[1]
        places = (beams * vocab + blocks)[:, None] + num_blocks * np.arange(self._block)
        tail_places = vocab * np.arange(len(scores))[:, None] + np.arange(vocab - tail.shape[1], vocab)
        found = np.concatenate([inside.ravel(), tail.ravel()])
        candidates = np.flatnonzero(found >= least)
        found = found[candidates]
        place = np.concatenate([places.ravel(), tail_places.ravel()])[candidates]
        order = np.lexsort((place, -found))[:k]
        return found[order], place[order] // vocab, place[order] % vocab


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

    def process(self, log_probs: BlockedLogProbs, first_row: int, width: int) -> None:
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
        self._log_probs = BlockedLogProbs()
        self._states = [_BeamState(config) for _ in range(num_prompts)]
        self._active = list(self._states)
        self._is_started = False

    def start(self) -> Ids:
        return np.array([state.rows[0] for state in self._states], dtype=np.int64)

    def advance(self, logits: Floats) -> Continuation | None:
        k = self._config.num_beams
        width = k if self._is_started else 1  # the opening is fed once per prompt: its beams are all alike
        last = logits[:, -1]
        ends = self._model_ends(last)
        self._log_probs.read(last)
        rows: list[Ids] = []
        tokens: list[Ids] = []
        kept: list[int] = []
        for place, state in enumerate(self._active):
            first_row = place * width
            state.process(self._log_probs, first_row, width)
            best = self._log_probs.best(first_row, state.scores, 2 * k, is_shared=width < k)
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

    def _model_ends(self, logits: Floats) -> npt.NDArray[np.bool_]:
        """Whether each row would end now of its own accord; asked only where the limit is about to end it."""
        if self._active[0].length + 1 < self._config.max_length:
            return np.zeros(len(logits), dtype=bool)
        ends: npt.NDArray[np.bool_] = logits.argmax(axis=-1) == self._config.eos_token_id
        return ends

    def results(self) -> list[GeneratedSequence]:
        best = [state.best[0] for state in self._states]
        return [GeneratedSequence(hypothesis.token_ids, hypothesis.truncated) for hypothesis in best]
