"""Sampling: tokens drawn at random from the processed scores.

Every answer has a generator of its own, seeded by `seed` and the answer's index among those of its prompt, and takes one
number from it a token. So equal seeds give equal answers whatever else is in the batch and however prompts enter it, up to
the rounding of the scores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from florence_onnx.generation.dense_processors import DenseProcessors
from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress, StopReason
from florence_onnx.generation.scores import Floats, Ids, StepScores
from florence_onnx.generation.search import (
    DecodeStep,
    GeneratedSequence,
    constrained_row,
    initial_tokens,
    new_scorer,
    would_end,
)


def new_seed() -> int:
    """A seed that was drawn."""
    return int.from_bytes(os.urandom(8), "little") >> 1  # at most options.MAX_SEED


def new_generator(seed: int | None, index: int) -> np.random.Generator:
    """The random numbers of one answer.

    Args:
        seed: None draws one.
        index: Of the answer among those of its prompt.
    """
    chosen = new_seed() if seed is None else seed
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([chosen, index])))


def draw(random: np.random.Generator, scores: Floats) -> int:
    """Draws a token with the probabilities softmax(scores) `(V,)`; the first best one where no score is finite."""
    number = random.random()
    greatest = scores.max()
    if not np.isfinite(greatest):
        return int(scores.argmax())
    cumulative = np.cumsum(np.exp(scores - greatest, dtype=np.float64))
    token = int(np.searchsorted(cumulative, number * cumulative[-1], side="right"))
    # the product may round up to the whole sum, behind the last token that can be drawn
    return token if token < len(scores) else int(np.flatnonzero(np.isfinite(scores))[-1])


def draw_without_replacement(random: np.random.Generator, scores: Floats, count: int) -> Ids:
    """Draws different places of `scores` `(n,)`, one after the other, each with the probabilities softmax of those left.

    Gumbel noise on the scores and a sort do that at once. Where fewer than `count` scores are finite, the first others follow.
    """
    possible = np.flatnonzero(np.isfinite(scores))
    noisy = scores[possible].astype(np.float64) + random.gumbel(size=len(possible))
    drawn: Ids = possible[np.argsort(-noisy, kind="stable")[:count]]
    if len(drawn) < min(count, len(scores)):
        others = np.flatnonzero(~np.isfinite(scores))
        drawn = np.concatenate([drawn, others[: count - len(drawn)]])
    return drawn


class _Sample:
    """One answer while it grows."""

    def __init__(self, config: SearchConfig, encoder_ids: Sequence[int], index: int) -> None:
        self._config = config
        self.tokens = initial_tokens(config)
        self._bans = LogitsProcessors(config, self.tokens, encoder_ids)
        self._processors = DenseProcessors(config, self._bans, encoder_ids)
        self._random = new_generator(config.seed, index)
        self._constrained = constrained_row(config, self.tokens)
        self._scorer = new_scorer(config)
        self._scores = None if self._scorer is None else self._scorer.start(self.tokens)
        self.answer: GeneratedSequence | None = None

    def advance(self, scores: StepScores, row: int) -> None:
        """Appends a token, unless the answer has ended."""
        if self.answer is not None:
            return
        tokens, last = self.tokens, scores.num_tokens - 1
        is_forced = self._processors.is_forced(len(tokens))
        allowed = None if self._constrained is None else self._constrained.allowed()
        token = draw(self._random, self._processors(tokens, scores.logits(row, last).copy(), allowed=allowed))
        if self._scorer is not None and self._scores is not None:
            self._scores = self._scorer.extend(self._scores, scores.distribution(row, last), token)
        tokens.append(token)
        self._bans.add(tokens)
        ends = self._config.end_tokens
        if token in ends or len(tokens) >= self._config.max_length:
            # an end that was forced, or the only way to end in time, says nothing; whether the likeliest token would have been an
            # end does
            is_whole = token in ends
            if is_forced or (is_whole and self._constrained is not None):
                is_whole = would_end(self._config, self._constrained, scores, row, last, at_limit=is_forced)
            self.answer = GeneratedSequence(tuple(tokens), not is_whole, scores=self._scores)
        if self._constrained is not None:
            self._constrained.append(token)

    def stop(self, reason: StopReason) -> None:
        """Ends the answer with the tokens that it has, unless it has ended."""
        if self.answer is None:
            self.answer = GeneratedSequence(tuple(self.tokens), reason, scores=self._scores)


class SampleSearch:
    """Draws `num_return_sequences` answers to every prompt."""

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
        progress: As for `generate.new_search`; of several answers to a prompt the first is followed.
        """
        self._count = config.num_return_sequences
        ids: Sequence[Sequence[int]] = encoder_ids if encoder_ids is not None else [()] * num_prompts
        self._prompts = [[_Sample(config, ids[i], n) for n in range(self._count)] for i in range(num_prompts)]
        self._active = list(self._prompts)
        self._active_progress = list(progress or ())
        self._has_branched = False

    def start(self) -> Ids:
        return np.array([samples[0].tokens for samples in self._prompts], dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        # as in beam search, the first call is fed one row a prompt, since its answers begin alike
        width = self._count if self._has_branched else 1
        self._has_branched = True
        rows: list[int] = []
        staying: list[int] = []
        for index, samples in enumerate(self._active):
            for place, sample in enumerate(samples):
                sample.advance(scores, index * width + min(place, width - 1))
            self._report(index)
            if any(sample.answer is None for sample in samples):
                staying.append(index)
                rows += [index * width + min(place, width - 1) for place in range(self._count)]
        self._active = [self._active[index] for index in staying]
        if self._active_progress:
            self._active_progress = [self._active_progress[index] for index in staying]
        if not staying:
            return None
        # every prompt keeps all its rows: an answer that has ended is fed its end again until its siblings have ended
        fed = [[sample.tokens[-1]] for samples in self._active for sample in samples]
        return DecodeStep(np.array(rows), np.array(staying), np.array(fed, dtype=np.int64))

    def _report(self, index: int) -> None:
        if not self._active_progress:
            return
        samples = self._active[index]
        if all(sample.answer is not None for sample in samples):
            return
        reason = self._active_progress[index].after_step(lambda: tuple(samples[0].tokens))
        if reason is not None:
            for sample in samples:
                sample.stop(reason)

    def results(self) -> list[GeneratedSequence]:
        found = [[sample.answer for sample in samples if sample.answer is not None] for samples in self._prompts]
        return [replace(best, alternatives=tuple(others)) for best, *others in found]
