"""Scores of one decoder call, in the form that the searches read.

There are two sources behind one interface (`StepScores`): `AllScores` holds all logits on the host; `TopScores` holds
the top-k logits that the device selected, and the log-sum that turns them into log-probabilities. Both lead to the same
tokens. The top-k do not suffice where so many of them are banned, or so many tokens are tied with the last of them,
that a token outside the top-k could win; then `TopScores` fetches all logits of that call.

A decoder call feeds S tokens to each row and scores each of them. `position` is the index of a fed token, 0 to S - 1
(not its place in the answer); the scores at a position are those of the token that follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.generation.token_scores import ListedDistribution, TokenDistribution, WholeDistribution

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

BLOCK = 128
"""Tokens in a block of `BlockedLogProbs`; Florence-2's 51,289 tokens make 400 blocks and a tail of 89 tokens."""


class LogProbs(Protocol):
    """Log-probabilities of the next token for some rows, from which beam search takes the top-k."""

    def ban(self, row: int, tokens: Sequence[int]) -> None:
        """Sets tokens of a row to minus infinity."""

    def force(self, row: int, token: int) -> None:
        """Sets one token of a row to 0 and all its others to minus infinity."""

    def allow(self, row: int, tokens: Ids) -> None:
        """Sets all tokens of a row but some `(n,)`, increasing, to minus infinity."""

    def top_k(self, first_row: int, beam_scores: Floats, k: int, *, is_shared: bool) -> tuple[Floats, Ids, Ids]:
        """Selects the k best continuations of the beams of one prompt; among equals the lower beam and token first.

        Args:
            first_row: Row of the first beam; the rows of the others follow it.
            beam_scores: `(K,)`, sum of log-probabilities of each beam so far.
            k: Number of continuations, at most K times the vocabulary.
            is_shared: Whether all beams read the first row, as they do before they have branched.

        Returns:
            Scores (best first), beams and tokens, each `(k,)`.
        """

    def distribution(self, row: int) -> TokenDistribution:
        """The model's own distribution of a row, whatever was banned or forced."""


class StepScores(Protocol):
    """Scores of one decoder call: for each row, one set of V scores for each fed token."""

    @property
    def num_tokens(self) -> int:
        """S, the number of positions."""

    def best_token(self, row: int, position: int, banned: Sequence[int] = ()) -> int:
        """The most probable token that is not banned; the lowest id among equals."""

    def best_allowed_token(self, row: int, position: int, allowed: Ids) -> int:
        """The most probable of some tokens `(n,)`, increasing; the lowest id among equals."""

    def log_probs(self, k: int) -> LogProbs:
        """Log-probabilities at the last position of every row, for `top_k` with at most this `k`."""

    def logits(self, row: int, position: int) -> Floats:
        """All logits `(V,)` at a position; valid until the next decoder call."""

    def distribution(self, row: int, position: int) -> TokenDistribution:
        """The model's distribution of the token after a position."""


class AllScores:
    """Scores of a decoder call whose logits are all on the host."""

    def __init__(self) -> None:
        self._log_probs = BlockedLogProbs()

    def read(self, logits: Floats) -> AllScores:
        """Takes the logits of the next call.

        Args:
            logits: `(rows, S, V)`, used in place and overwritten.

        Returns:
            This object.
        """
        self._logits = logits
        return self

    @property
    def num_tokens(self) -> int:
        return int(self._logits.shape[1])

    def best_token(self, row: int, position: int, banned: Sequence[int] = ()) -> int:
        logits = self._logits[row, position]
        if not banned:
            return int(logits.argmax())
        ids = list(banned)
        own = logits[ids]
        logits[ids] = -np.inf
        best = int(logits.argmax())
        logits[ids] = own  # the model's distribution may still be asked for
        return best

    def best_allowed_token(self, row: int, position: int, allowed: Ids) -> int:
        return int(allowed[self._logits[row, position, allowed].argmax()])

    def log_probs(self, k: int) -> LogProbs:
        self._log_probs.read(self._logits[:, -1])
        return self._log_probs

    def logits(self, row: int, position: int) -> Floats:
        logits: Floats = self._logits[row, position]
        return logits

    def distribution(self, row: int, position: int) -> TokenDistribution:
        return WholeDistribution(self._logits[row, position])


class BlockedLogProbs:
    """Log-probabilities `(R, V)` with the maximum of every block of tokens, in buffers that are reused between steps.

    Block b of n holds the tokens b, b + n, b + 2n, …, so that the maxima of all n blocks are one elementwise maximum of
    `block` contiguous vectors. The last V mod n·block tokens are in no block; `top_k` always looks at this tail.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self._block = block
        self._scratch: Floats = np.zeros((0, 0), dtype=np.float32)

    def read(self, logits: Floats) -> None:
        """Takes the logits of the next step.

        Args:
            logits: `(R, V)`, used in place and overwritten.
        """
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
        # log-softmax is (logit - greatest) - log_sum. The second subtraction waits until `top_k` knows which few values
        # it needs: the same two roundings as for the whole vocabulary, one pass over (R, V) less.
        self._values -= greatest
        self._maxima -= greatest
        np.exp(self._values, out=self._scratch)
        self._log_sums: Floats = np.log(self._scratch.sum(axis=1, keepdims=True))
        self._banned: dict[int, dict[int, float]] = {}
        self._forced: dict[int, TokenDistribution] = {}
        self._allowed: dict[int, Ids] = {}

    def allow(self, row: int, tokens: Ids) -> None:
        self._allowed[row] = tokens  # `top_k` looks at these alone, and the model's distribution stays as it is

    def ban(self, row: int, tokens: Sequence[int]) -> None:
        own = self._banned.setdefault(row, {})
        for token in tokens:
            own.setdefault(token, float(self._values[row, token]))
            self._values[row, token] = -np.inf
            if token < self._blocks[0].size:
                block = token % self._maxima.shape[1]
                self._maxima[row, block] = self._blocks[row, :, block].max()

    def distribution(self, row: int) -> TokenDistribution:
        forced = self._forced.get(row)
        return forced or WholeDistribution(self._values[row], float(self._log_sums[row, 0]), self._banned.get(row))

    def force(self, row: int, token: int) -> None:
        # at most once an answer, so that a copy costs nothing
        own = WholeDistribution(self._values[row].copy(), float(self._log_sums[row, 0]), self._banned.get(row))
        self._forced.setdefault(row, own)
        self._values[row] = self._maxima[row] = -np.inf
        self._values[row, token] = self._log_sums[row] = 0
        if token < self._blocks[0].size:
            self._maxima[row, token % self._maxima.shape[1]] = 0

    def top_k(self, first_row: int, beam_scores: Floats, k: int, *, is_shared: bool) -> tuple[Floats, Ids, Ids]:
        num_beams = len(beam_scores)
        rows = np.full(num_beams, first_row) if is_shared else np.arange(first_row, first_row + num_beams)
        if self._allowed:
            allowed = [self._allowed.get(row, ALL) for row in rows.tolist()]
            return top_k_of_allowed(self._values[rows], self._log_sums[rows], allowed, beam_scores, k)
        beam, log_sum = beam_scores[:, None], self._log_sums[rows]
        maxima = (self._maxima[rows] - log_sum) + beam
        # Each of the k greatest block maxima is the score of some token, so at least k tokens reach the k-th of them
        # and nothing below it is among the top k. Only blocks whose maximum reaches it are looked into: about k of 400.
        threshold = np.partition(maxima, maxima.size - k, axis=None)[maxima.size - k] if maxima.size > k else -np.inf
        beams, blocks = np.nonzero(maxima >= threshold)
        inside = (self._blocks[rows[beams], :, blocks] - log_sum[beams]) + beam[beams]
        tail = (self._tail[rows] - log_sum) + beam
        vocab, num_blocks = self._values.shape[1], self._maxima.shape[1]
        inside_keys = (beams * vocab + blocks)[:, None] + num_blocks * np.arange(self._block)
        tail_keys = vocab * np.arange(num_beams)[:, None] + np.arange(vocab - tail.shape[1], vocab)
        totals = np.concatenate([inside.ravel(), tail.ravel()])
        candidates = np.flatnonzero(totals >= threshold)
        keys = np.concatenate([inside_keys.ravel(), tail_keys.ravel()])[candidates]
        return sort_top_k(totals[candidates], keys, k, vocab)


ALL: Ids = np.zeros(0, dtype=np.int64)
"""In the place of allowed tokens: every token is."""


def is_among(ids: Ids, allowed: Ids) -> npt.NDArray[np.bool_]:
    """Which ids are among increasing ones, of which there is at least one."""
    places = np.minimum(np.searchsorted(allowed, ids), len(allowed) - 1)
    found: npt.NDArray[np.bool_] = allowed[places] == ids
    return found


def top_k_of_allowed(
    shifted: Floats, log_sums: Floats, allowed: Sequence[Ids], beam_scores: Floats, k: int
) -> tuple[Floats, Ids, Ids]:
    """As `LogProbs.top_k`, where some beams are limited to a few tokens.

    Args:
        shifted: `(K, V)`, of each beam the logits less the greatest of its row.
        log_sums: `(K, 1)`, what is to be subtracted from them.
        allowed: Of each beam the tokens that may follow; `ALL` for any.
        beam_scores: See `LogProbs.top_k`.
        k: See `LogProbs.top_k`.
    """
    vocab = shifted.shape[1]
    totals, keys = [], []
    for beam, ids in enumerate(allowed):
        ids = ids if len(ids) else np.arange(vocab)
        values, ids = _best_of((shifted[beam, ids] - log_sums[beam]) + beam_scores[beam], ids, k)
        totals.append(values)
        keys.append(ids + beam * vocab)
    found, places = np.concatenate(totals), np.concatenate(keys)
    if len(found) < k:  # the lowest other tokens fill up, at minus infinity
        others = np.setdiff1d(np.arange(min(len(allowed) * vocab, len(found) + k)), places)[: k - len(found)]
        found = np.concatenate([found, np.full(len(others), -np.inf, dtype=np.float32)])
        places = np.concatenate([places, others])
    elif len(found) > k:
        best = found >= np.partition(found, len(found) - k)[len(found) - k]
        found, places = found[best], places[best]
    return sort_top_k(found, places, k, vocab)


def _best_of(values: Floats, ids: Ids, k: int) -> tuple[Floats, Ids]:
    """Values and ids `(n,)` without most of those that are not among the k best; see `BlockedLogProbs.top_k`."""
    num_blocks = len(values) // BLOCK
    if num_blocks <= k:
        return values, ids
    maxima = values[: num_blocks * BLOCK].reshape(BLOCK, num_blocks).max(axis=0)
    kept = np.flatnonzero(values >= np.partition(maxima, num_blocks - k)[num_blocks - k])
    return values[kept], ids[kept]


def sort_top_k(totals: Floats, keys: Ids, k: int, vocab_size: int) -> tuple[Floats, Ids, Ids]:
    """Sorts candidates into the top k, as `LogProbs.top_k` returns them.

    Args:
        totals: `(n,)`, score of each candidate.
        keys: `(n,)`, `beam * vocab_size + token` of each; the lower key wins a tie.
        k: How many to return.
        vocab_size: V.
    """
    order = np.lexsort((keys, -totals))[:k]
    return totals[order], keys[order] // vocab_size, keys[order] % vocab_size


class TopScores:
    """Scores of a decoder call of which the device sent the top-k; all logits are fetched when those do not decide."""

    def __init__(
        self, values: Floats, ids: Ids, log_sums: Floats, vocab_size: int, fetch: Callable[[], Floats]
    ) -> None:
        """Wraps the outputs of `decoder_top.onnx`.

        Args:
            values: `(rows, S, k)`, the greatest logits, best first.
            ids: `(rows, S, k)`, their tokens. The order of equal logits is up to the device.
            log_sums: `(rows, S)`, logarithm of the sum of exp(logit - greatest logit) over the vocabulary.
            vocab_size: V.
            fetch: Returns all logits `(rows, S, V)`.
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

    def last_position(self) -> TopScores:
        """The scores at the last position of each row only."""
        last = self._values[:, -1:], self._ids[:, -1:], self._log_sums[:, -1:]
        return TopScores(*last, self._vocab_size, lambda: self._fetch()[:, -1:])

    @property
    def was_fetched(self) -> bool:
        """Whether the top-k did not suffice and all logits were copied to the host."""
        return self._fetched is not None

    def best_token(self, row: int, position: int, banned: Sequence[int] = ()) -> int:
        values, ids = self._values[row, position].tolist(), self._ids[row, position].tolist()
        allowed = [(-value, token) for value, token in zip(values, ids, strict=True) if token not in banned]
        is_complete = len(ids) == self._vocab_size
        # A winner that is tied with the last of the top-k may be tied with unlisted tokens too, and the lowest id of
        # all must win, as in argmax.
        if not is_complete and (not allowed or -allowed[0][0] == values[-1]):
            return self._best_of_all(row, position, banned)
        return min(allowed)[1] if allowed else 0  # everything banned: argmax of nothing but -inf is 0

    def best_allowed_token(self, row: int, position: int, allowed: Ids) -> int:
        values, ids = self._values[row, position], self._ids[row, position]
        listed = is_among(ids, allowed)
        is_complete = listed.sum() == len(allowed)
        best = values[listed].max(initial=-np.inf)
        # as in `best_token`, for a winner that is tied with the last of the top-k
        if not is_complete and (not listed.any() or best == values[-1]):
            return int(allowed[self.logits(row, position)[allowed].argmax()])
        return int(ids[listed & (values == best)].min())

    def _best_of_all(self, row: int, position: int, banned: Sequence[int]) -> int:
        logits = self.logits(row, position).copy()
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
            lambda row: self.distribution(row, last),
        )

    def logits(self, row: int, position: int) -> Floats:
        logits: Floats = self._all()[row, position]
        return logits

    def distribution(self, row: int, position: int) -> TokenDistribution:
        values, log_sum = self._values[row, position], float(self._log_sums[row, position])
        if self._fetched is not None:
            return WholeDistribution(self._fetched[row, position], float(values[0]) + log_sum)
        return ListedDistribution(values, self._ids[row, position], float(values[0]) + log_sum)

    def _all(self) -> Floats:
        if self._fetched is None:
            self._fetched = self._fetch()
        return self._fetched


class _TopLogProbs:
    """Log-probabilities of the top-k of some rows; rows for which they do not decide are completed one by one."""

    def __init__(
        self,
        shifted: Floats,
        ids: Ids,
        log_sums: Floats,
        vocab_size: int,
        fetch_row: Callable[[int], Floats],
        distribution: Callable[[int], TokenDistribution],
    ) -> None:
        """Wraps the last position of `TopScores`.

        Args:
            shifted: `(R, k)`, logits less the greatest of their row, best first.
            ids: `(R, k)`, their tokens.
            log_sums: `(R,)`, as for `TopScores`.
            vocab_size: V.
            fetch_row: Returns all logits `(V,)` of a row.
            distribution: Returns the model's distribution of a row.
        """
        self._shifted = shifted
        self._ids = ids
        self._log_sums = log_sums
        self._vocab_size = vocab_size
        self._fetch_row = fetch_row
        self._distribution = distribution
        self._banned: dict[int, list[int]] = {}
        self._forced: dict[int, int] = {}
        self._allowed: dict[int, Ids] = {}

    def allow(self, row: int, tokens: Ids) -> None:
        self._allowed[row] = tokens

    def ban(self, row: int, tokens: Sequence[int]) -> None:
        self._banned.setdefault(row, []).extend(tokens)

    def force(self, row: int, token: int) -> None:
        self._forced[row] = token

    def distribution(self, row: int) -> TokenDistribution:
        return self._distribution(row)

    def top_k(self, first_row: int, beam_scores: Floats, k: int, *, is_shared: bool) -> tuple[Floats, Ids, Ids]:
        rows = [first_row if is_shared else first_row + beam for beam in range(len(beam_scores))]
        listed = [self._listed(row, k) for row in rows]
        totals = [log_probs + score for (log_probs, _), score in zip(listed, beam_scores, strict=True)]
        every = np.concatenate(totals)
        threshold = np.partition(every, len(every) - k)[len(every) - k] if len(every) > k else -np.inf
        for beam, row in enumerate(rows):
            # An unlisted token scores at most what the last listed one does. If that bound reaches the k-th best, an
            # unlisted token may be among the top k, or tie with its last and win by a lower id: look at the whole row.
            bound = self._shifted[row, -1] - self._log_sums[row] + beam_scores[beam]
            # (a bound of minus infinity is that of a beam that is not possible, and nothing decides about those)
            if not self._is_complete(row) and bound >= threshold and bound > -np.inf:
                listed[beam] = self._whole_row(row)
                totals[beam] = listed[beam][0] + beam_scores[beam]
        keys = [ids + beam * self._vocab_size for beam, (_, ids) in enumerate(listed)]
        return sort_top_k(np.concatenate(totals), np.concatenate(keys), k, self._vocab_size)

    def _listed(self, row: int, k: int) -> tuple[Floats, Ids]:
        """Log-probabilities and tokens of a row without fetching anything."""
        if row in self._forced:
            return self._forced_only(self._forced[row], k)
        return self._log_probs(row, self._shifted[row], self._ids[row])

    def _is_complete(self, row: int) -> bool:
        """Whether no token outside the list can matter."""
        if row in self._allowed and is_among(self._ids[row], self._allowed[row]).sum() == len(self._allowed[row]):
            return True
        return row in self._forced or self._shifted.shape[1] == self._vocab_size

    def _whole_row(self, row: int) -> tuple[Floats, Ids]:
        logits = self._fetch_row(row)
        return self._log_probs(row, logits - logits.max(), np.arange(self._vocab_size))

    def _log_probs(self, row: int, shifted: Floats, ids: Ids) -> tuple[Floats, Ids]:
        log_probs = shifted - self._log_sums[row]
        if row in self._banned:
            log_probs[np.isin(ids, self._banned[row])] = -np.inf
        if row in self._allowed:
            log_probs[~is_among(ids, self._allowed[row])] = -np.inf
        return log_probs, ids

    def _forced_only(self, token: int, k: int) -> tuple[Floats, Ids]:
        """The forced token at 0, and the lowest other ids at minus infinity to fill up k candidates."""
        ids = np.union1d(np.arange(min(k, self._vocab_size)), [token])
        return np.where(ids == token, np.float32(0), np.float32(-np.inf)), ids
