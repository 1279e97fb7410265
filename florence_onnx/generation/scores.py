"""What a search reads from a decoder call: all logits on the host, or the best few that the device has found.

Both give the same tokens. The few suffice unless so many tokens are forbidden, or so many are equal, that the choice could lie beyond
them; then all logits of the call are fetched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK = 128
"""Tokens whose greatest score is found first; only the blocks that can hold a candidate are looked at again."""


class LogProbs(Protocol):
    """Log-probabilities of the next token after some rows, of which the best are asked for."""

    def ban(self, row: int, tokens: Sequence[int]) -> None:
        """Makes tokens of a row impossible."""

    def force(self, row: int, token: int) -> None:
        """Makes a token of a row certain and all others impossible."""

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


class StepScores(Protocol):
    """The scores of one decoder call: a row for each row of tokens, in it a place for each token that was fed."""

    @property
    def num_tokens(self) -> int:
        """Places of a row."""

    def best_token(self, row: int, place: int, banned: Sequence[int] = ()) -> int:
        """The most probable token, the lowest among equals."""

    def log_probs(self, k: int) -> LogProbs:
        """Of the last place of every row, of which at most `k` are going to be asked for."""

    def logits(self, row: int, place: int) -> Floats:
        """All logits `(V,)` of a place; valid until the next call."""


class AllScores:
    """Complete logits on the host."""

    def __init__(self) -> None:
        self._log_probs = BlockedLogProbs()

    def read(self, logits: Floats) -> AllScores:
        """Args: logits `(rows, S, V)`; taken over and overwritten."""
        self._logits = logits
        return self

    @property
    def num_tokens(self) -> int:
        return int(self._logits.shape[1])

    def best_token(self, row: int, place: int, banned: Sequence[int] = ()) -> int:
        for token in banned:
            self._logits[row, place, token] = -np.inf
        return int(self._logits[row, place].argmax())

    def log_probs(self, k: int) -> LogProbs:
        self._log_probs.read(self._logits[:, -1])
        return self._log_probs

    def logits(self, row: int, place: int) -> Floats:
        logits: Floats = self._logits[row, place]
        return logits


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
        for token in tokens:
            self._values[row, token] = -np.inf
            if token < self._blocks[0].size:
                block = token % self._maxima.shape[1]
                self._maxima[row, block] = self._blocks[row, :, block].max()

    def force(self, row: int, token: int) -> None:
        self._values[row] = self._maxima[row] = -np.inf
        self._values[row, token] = self._log_sums[row] = 0
        if token < self._blocks[0].size:
            self._maxima[row, token % self._maxima.shape[1]] = 0

    def best(self, first_row: int, scores: Floats, k: int, *, is_shared: bool) -> tuple[Floats, Ids, Ids]:
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
        place = np.concatenate([places.ravel(), tail_places.ravel()])[candidates]
        return _first(found[candidates], place, k, vocab)


def _first(found: Floats, place: Ids, k: int, vocab_size: int) -> tuple[Floats, Ids, Ids]:
    """Args: found and place `(n,)`, a score and `beam * vocab_size + token` of each candidate."""
    order = np.lexsort((place, -found))[:k]
    return found[order], place[order] // vocab_size, place[order] % vocab_size


class TopScores:
    """The best tokens of every place, found on a device, and the way to the complete logits."""

    def __init__(
        self, values: Floats, ids: Ids, log_sums: Floats, vocab_size: int, fetch: Callable[[], Floats]
    ) -> None:
        """Args:
        values: `(rows, S, k)`, the greatest logits, best first.
        ids: `(rows, S, k)`, their tokens.
        log_sums: `(rows, S)`, the logarithm of the sum of exp(logit - greatest logit).
        vocab_size: V.
        fetch: Gives all logits `(rows, S, V)`.
        """
        self._values = values
        self._ids = ids
        self._log_sums = log_sums
        self._vocab_size = vocab_size
        self._fetch = fetch
        self._fetched: Floats | None = None

    @property
    def num_tokens(self) -> int:
        return int(self._values.shape[1])

    def last_place(self) -> TopScores:
        """The scores after the last token of each row only."""
        last = self._values[:, -1:], self._ids[:, -1:], self._log_sums[:, -1:]
        return TopScores(*last, self._vocab_size, lambda: self._fetch()[:, -1:])

    @property
    def was_fetched(self) -> bool:
        """Whether the best tokens did not suffice."""
        return self._fetched is not None

    def best_token(self, row: int, place: int, banned: Sequence[int] = ()) -> int:
        values, ids = self._values[row, place].tolist(), self._ids[row, place].tolist()
        allowed = [(-value, token) for value, token in zip(values, ids, strict=True) if token not in banned]
        is_complete = len(ids) == self._vocab_size
        # equal to the last one: an equal token of a lower id may lie beyond it
        if not is_complete and (not allowed or -allowed[0][0] == values[-1]):
            return self._best_of_all(row, place, banned)
        return min(allowed)[1] if allowed else 0  # where all are forbidden, as the maximum of equal numbers

    def _best_of_all(self, row: int, place: int, banned: Sequence[int]) -> int:
        logits = self.logits(row, place).copy()
        logits[list(banned)] = -np.inf
        return int(logits.argmax())

    def log_probs(self, k: int) -> LogProbs:
        if k > self._values.shape[2] < self._vocab_size:
            blocked = BlockedLogProbs()
            blocked.read(self._all()[:, -1].copy())
            return blocked
        values, last = self._values[:, -1], self.num_tokens - 1
        return _TopLogProbs(
            values - values[:, :1],
            self._ids[:, -1],
            self._log_sums[:, -1],
            self._vocab_size,
            lambda row: self.logits(row, last),
        )

    def logits(self, row: int, place: int) -> Floats:
        logits: Floats = self._all()[row, place]
        return logits

    def _all(self) -> Floats:
        if self._fetched is None:
            self._fetched = self._fetch()
        return self._fetched


class _TopLogProbs:
    """The best tokens of some rows; a row of which more are needed is completed."""

    def __init__(
        self, shifted: Floats, ids: Ids, log_sums: Floats, vocab_size: int, complete: Callable[[int], Floats]
    ) -> None:
        """Args:
        shifted: `(R, k)`, logits less the greatest.
        ids: `(R, k)`.
        log_sums: `(R,)`.
        vocab_size: V.
        complete: Gives all logits `(V,)` of a row.
        """
        self._shifted = shifted
        self._ids = ids
        self._log_sums = log_sums
        self._vocab_size = vocab_size
        self._complete = complete
        self._banned: dict[int, list[int]] = {}
        self._forced: dict[int, int] = {}

    def ban(self, row: int, tokens: Sequence[int]) -> None:
        self._banned.setdefault(row, []).extend(tokens)

    def force(self, row: int, token: int) -> None:
        self._forced[row] = token

    def best(self, first_row: int, scores: Floats, k: int, *, is_shared: bool) -> tuple[Floats, Ids, Ids]:
        rows = [first_row if is_shared else first_row + beam for beam in range(len(scores))]
        found = [self._listed(row, k) for row in rows]
        totals = [values + score for (values, _), score in zip(found, scores, strict=True)]
        every = np.concatenate(totals)
        least = np.partition(every, len(every) - k)[len(every) - k] if len(every) > k else -np.inf
        for beam, row in enumerate(rows):
            # what is not listed is at most what is listed last; an equal token of a lower id would come first
            if not self._is_known(row) and self._shifted[row, -1] - self._log_sums[row] + scores[beam] >= least:
                found[beam] = self._all_of(row)
                totals[beam] = found[beam][0] + scores[beam]
        place = [ids + beam * self._vocab_size for beam, (_, ids) in enumerate(found)]
        return _first(np.concatenate(totals), np.concatenate(place), k, self._vocab_size)

    def _listed(self, row: int, k: int) -> tuple[Floats, Ids]:
        """Log-probabilities and tokens that are known of a row."""
        if row in self._forced:
            return self._only(self._forced[row], k)
        return self._log_probs(row, self._shifted[row], self._ids[row])

    def _is_known(self, row: int) -> bool:
        """Whether the list is all that there is to know."""
        return row in self._forced or self._shifted.shape[1] == self._vocab_size

    def _all_of(self, row: int) -> tuple[Floats, Ids]:
        logits = self._complete(row)
        return self._log_probs(row, logits - logits.max(), np.arange(self._vocab_size))

    def _log_probs(self, row: int, shifted: Floats, ids: Ids) -> tuple[Floats, Ids]:
        log_probs = shifted - self._log_sums[row]
        if row in self._banned:
            log_probs[np.isin(ids, self._banned[row])] = -np.inf
        return log_probs, ids

    def _only(self, token: int, k: int) -> tuple[Floats, Ids]:
        """The forced token, and the first others as impossible ones."""
        ids = np.union1d(np.arange(min(k, self._vocab_size)), [token])
        return np.where(ids == token, np.float32(0), np.float32(-np.inf)), ids
