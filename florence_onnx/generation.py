"""How tokens are chosen: logits processors, greedy and beam search, and the loop that drives a decoder.

Everything here works on token ids and logits; text never appears. The searches reproduce `generate` of transformers
4.57 token for token. Prompts of a batch do not influence each other, so a finished prompt leaves the batch at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.options import SearchConfig

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

_UNREACHABLE = np.float32(-1.0e9)
"""Score of a beam that must not be chosen, as in transformers; finite, so that sums stay comparable."""


@dataclass(frozen=True)
class GeneratedSequence:
    """One answer in tokens."""

    token_ids: tuple[int, ...]
    """From the decoder start token to the end token, without padding."""
    truncated: bool
    """Whether the token limit ended it before the model did."""


class DecoderSession(Protocol):
    """A decoder with the encoder's output of some prompts and a cache for the rows in flight."""

    def step(self, token_ids: Ids) -> Floats:
        """Feeds tokens `(rows, S)` and returns the logits `(rows, V)` after the last, valid until the next step."""

    def reorder(self, rows: Ids, prompts: Ids) -> None:
        """Lets new row i continue old row `rows[i]`.

        Args:
            rows: `(R,)`; rows of one prompt are adjacent and every prompt has equally many.
            prompts: `(P,)`, increasing; the prompts, in their present numbering, that stay.
        """


@dataclass(frozen=True)
class Continuation:
    """What the decoder does next."""

    rows: Ids
    """`(R,)` the present row that each next row continues."""
    prompts: Ids
    """`(P,)` the present prompts that stay."""
    token_ids: Ids
    """`(R, 1)` the token that each next row is fed."""


class Search(Protocol):
    """A way to choose tokens."""

    def start(self) -> Ids:
        """The tokens `(P, S)` that open every prompt's answer."""

    def advance(self, logits: Floats) -> Continuation | None:
        """Takes the logits `(rows, V)`, which it may overwrite, and says how to go on; None when all is done."""

    def results(self) -> list[GeneratedSequence]:
        """One answer per prompt, in the order of the prompts."""


def generate(session: DecoderSession, num_prompts: int, config: SearchConfig) -> list[GeneratedSequence]:
    """Decodes every prompt of a session.

    Args:
        session: Decoder that holds `num_prompts` encoded prompts and no token yet.
        num_prompts: Number of prompts.
        config: How to search.

    Returns:
        One sequence per prompt.
    """
    search: Search = (GreedySearch if config.num_beams == 1 else BeamSearch)(num_prompts, config)
    logits = session.step(search.start())
    while (continuation := search.advance(logits)) is not None:
        session.reorder(continuation.rows, continuation.prompts)
        logits = session.step(continuation.token_ids)
    return search.results()


# --------------------------------------------------------------------------------------------------- logits processors


class LogitsProcessor(Protocol):
    """Changes scores in place before tokens are chosen."""

    def __call__(self, sequences: Ids, scores: Floats) -> None:
        """Args: sequences `(rows, length)` so far; scores `(rows, V)`."""


@dataclass(frozen=True)
class NoRepeatNGram:
    """Forbids tokens that would complete an n-gram which the sequence already holds."""

    size: int

    def __call__(self, sequences: Ids, scores: Floats) -> None:
        length = sequences.shape[1]
        if length < self.size:
            return
        starts = length - self.size + 1
        repeated = np.ones((sequences.shape[0], starts), dtype=bool)
        for k in range(self.size - 1):
            repeated &= sequences[:, k : k + starts] == sequences[:, starts + k, None]
        rows, places = np.nonzero(repeated)
        scores[rows, sequences[rows, places + self.size - 1]] = -np.inf


@dataclass(frozen=True)
class MinNewTokens:
    """Forbids the end token while fewer than `count` tokens were generated."""

    count: int
    eos_token_id: int

    def __call__(self, sequences: Ids, scores: Floats) -> None:
        if sequences.shape[1] - 1 < self.count:
            scores[:, self.eos_token_id] = -np.inf


@dataclass(frozen=True)
class ForcedToken:
    """Leaves a single token possible when the sequence has a given length."""

    length: int
    token_id: int

    def __call__(self, sequences: Ids, scores: Floats) -> None:
        if sequences.shape[1] == self.length:
            scores[:] = -np.inf
            scores[:, self.token_id] = 0


def logits_processors(config: SearchConfig) -> list[LogitsProcessor]:
    """The processors that a configuration asks for, in transformers' order."""
    found: list[LogitsProcessor] = []
    if config.no_repeat_ngram_size:
        found.append(NoRepeatNGram(config.no_repeat_ngram_size))
    if config.min_new_tokens:
        found.append(MinNewTokens(config.min_new_tokens, config.eos_token_id))
    if config.forced_bos_token_id is not None:
        found.append(ForcedToken(1, config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        found.append(ForcedToken(config.max_length - 1, config.forced_eos_token_id))
    return found


def opening(config: SearchConfig) -> list[int]:
    """The tokens known before anything is computed: the start token, and a forced first token after it.

    Feeding both in one step saves a decoder call. Where the limit leaves room for one token only, the forced last
    token has precedence, as in transformers.
    """
    forced = config.forced_bos_token_id
    if forced is None or forced == config.eos_token_id or config.max_length <= 2:
        return [config.decoder_start_token_id]
    return [config.decoder_start_token_id, forced]


class _Sequences:
    """Rows of equal, growing length in one preallocated array."""

    def __init__(self, num_rows: int, config: SearchConfig) -> None:
        first = opening(config)
        self.length = len(first)
        self._capacity = config.max_length
        self._ids = np.zeros((num_rows, min(64, config.max_length)), dtype=np.int64)
        self._ids[:, : self.length] = first

    @property
    def ids(self) -> Ids:
        """`(rows, length)`."""
        return self._ids[:, : self.length]

    def select(self, rows: Ids) -> None:
        self._ids = self._ids[rows]

    def append(self, tokens: Ids) -> None:
        if self.length == self._ids.shape[1]:
            room = min(2 * self.length, self._capacity) - self.length
            self._ids = np.pad(self._ids, ((0, 0), (0, room)))
        self._ids[:, self.length] = tokens
        self.length += 1


# -------------------------------------------------------------------------------------------------------------- greedy


class GreedySearch:
    """Takes the most probable token at every step."""

    def __init__(self, num_prompts: int, config: SearchConfig) -> None:
        self._config = config
        self._processors = logits_processors(config)
        self._sequences = _Sequences(num_prompts, config)
        self._prompts = np.arange(num_prompts)
        self._results: dict[int, GeneratedSequence] = {}

    def start(self) -> Ids:
        return np.array(self._sequences.ids)

    def advance(self, logits: Floats) -> Continuation | None:
        config, sequences = self._config, self._sequences
        at_limit = sequences.length + 1 >= config.max_length
        unforced = logits.argmax(axis=-1) if at_limit else None
        for process in self._processors:
            process(sequences.ids, logits)
        tokens = logits.argmax(axis=-1)
        sequences.append(tokens)
        done = (tokens == config.eos_token_id) | at_limit
        for row in np.flatnonzero(done):
            truncated = unforced is not None and bool(unforced[row] != config.eos_token_id)
            answer = GeneratedSequence(tuple(sequences.ids[row].tolist()), truncated)
            self._results[int(self._prompts[row])] = answer
        keep = np.flatnonzero(~done)
        if not len(keep):
            return None
        sequences.select(keep)
        self._prompts = self._prompts[keep]
        return Continuation(keep, keep, tokens[keep, None])

    def results(self) -> list[GeneratedSequence]:
        return [self._results[prompt] for prompt in sorted(self._results)]


# ---------------------------------------------------------------------------------------------------------------- beam


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities `(rows, V)`, computed in place in float32."""
    logits -= logits.max(axis=-1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return logits


def top_k(values: Floats, k: int) -> Ids:
    """Indices of the k greatest entries of a vector, greatest first, the lower index first among equals."""
    if k < len(values):
        candidates = np.argpartition(values, len(values) - k)[len(values) - k :]
        candidates.sort()
    else:
        candidates = np.arange(len(values))
    order = np.argsort(-values[candidates], kind="stable")
    return np.asarray(candidates[order], dtype=np.int64)


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
        self.sequences = _Sequences(k, config)
        self.scores: Floats = np.full(k, _UNREACHABLE, dtype=np.float32)
        self.scores[0] = 0  # all beams start alike: only the first may branch
        self.best = [_Hypothesis((), _UNREACHABLE, False, False)] * k
        self._can_improve = True

    def advance(self, log_probs: Floats, ends: npt.NDArray[np.bool_]) -> tuple[Ids, Ids] | None:
        """Extends the beams by one token.

        Args:
            log_probs: `(K, V)` processed log-probabilities of the next token; overwritten.
            ends: `(K,)` whether the model itself would end the row now (asked only at the token limit).

        Returns:
            Parent beam and token of every next beam, both `(K,)`, or None when the search is over.
        """
        k, vocab = log_probs.shape
        log_probs += self.scores[:, None]
        top = top_k(log_probs.reshape(-1), 2 * k)
        scores = log_probs.reshape(-1)[top]
        parents, tokens = top // vocab, top % vocab
        at_limit = self.sequences.length + 1 >= self._config.max_length
        stops = (tokens == self._config.eos_token_id) | at_limit
        self._finish(scores, parents, tokens, stops, at_limit & ~ends)
        following = np.argsort(-(scores + stops * _UNREACHABLE), kind="stable")[:k]
        self.scores = (scores + stops * _UNREACHABLE)[following]
        self.sequences.select(parents[following])
        self.sequences.append(tokens[following])
        if stops.all() or not self._goes_on():
            return None
        return parents[following], tokens[following]

    def _finish(
        self, scores: Floats, parents: Ids, tokens: Ids, stops: npt.NDArray[np.bool_], cut: npt.NDArray[np.bool_]
    ) -> None:
        """Lets candidates among the first K that stop compete with the finished hypotheses; `cut` is per parent."""
        k, length = self._config.num_beams, self.sequences.length
        closed = not self._can_improve or (self._config.early_stopping is True and self._is_full)
        if closed or not stops[:k].any():
            return
        normed = scores / np.float32(length**self._config.length_penalty)
        for rank in np.flatnonzero(stops[:k]):
            sequence = (*self.sequences.ids[parents[rank]].tolist(), int(tokens[rank]))
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
        length = (config.max_length if to_the_end else self.sequences.length) - 1
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
        self._processors = logits_processors(config)
        self._states = [_BeamState(config) for _ in range(num_prompts)]
        self._active = list(range(num_prompts))
        self._is_started = False

    def start(self) -> Ids:
        return np.tile(np.array(opening(self._config), dtype=np.int64), (len(self._states), 1))

    def advance(self, logits: Floats) -> Continuation | None:
        k = self._config.num_beams
        width = k if self._is_started else 1  # the opening is fed once per prompt: its beams are all alike
        active = [self._states[prompt] for prompt in self._active]
        ends = self._model_ends(logits, active[0])
        log_probs = log_softmax(logits)
        self._process(active, log_probs, width)
        rows: list[Ids] = []
        tokens: list[Ids] = []
        kept: list[int] = []
        for place, state in enumerate(active):
            own = slice(place * width, (place + 1) * width)
            step = state.advance(_widen(log_probs[own], k), _widen(ends[own], k))
            if step is not None:
                rows.append(place * width + np.minimum(step[0], width - 1))
                tokens.append(step[1])
                kept.append(place)
        self._is_started = True
        self._active = [self._active[place] for place in kept]
        if not kept:
            return None
        return Continuation(np.concatenate(rows), np.array(kept), np.concatenate(tokens)[:, None])

    def _model_ends(self, logits: Floats, state: _BeamState) -> npt.NDArray[np.bool_]:
        """Whether each row would end now of its own accord; asked only where the limit is about to end it."""
        if state.sequences.length + 1 < self._config.max_length:
            return np.zeros(len(logits), dtype=bool)
        ends: npt.NDArray[np.bool_] = logits.argmax(axis=-1) == self._config.eos_token_id
        return ends

    def _process(self, active: Sequence[_BeamState], log_probs: Floats, width: int) -> None:
        sequences = np.concatenate([state.sequences.ids[:width] for state in active])
        for process in self._processors:
            process(sequences, log_probs)

    def results(self) -> list[GeneratedSequence]:
        best = [state.best[0] for state in self._states]
        return [GeneratedSequence(hypothesis.token_ids, hypothesis.truncated) for hypothesis in best]


def _widen(values: npt.NDArray[Any], num_rows: int) -> npt.NDArray[Any]:
    return values if len(values) == num_rows else np.repeat(values, num_rows, axis=0)
