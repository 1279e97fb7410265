"""Which of some given answers the model finds likeliest: exact log-probabilities of all, from one pass over their trie.

Choices that begin alike share those tokens. All tokens at one depth of the trie are rows of one decoder call, so a pass takes as
many calls as the longest choice has tokens, and no more rows than there are choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from florence_onnx.errors import OptionsError
from florence_onnx.generation.options import MAX_BEAMS, SearchConfig
from florence_onnx.generation.progress import Progress, StopReason
from florence_onnx.generation.sampling import draw_without_replacement, new_generator
from florence_onnx.generation.scores import Ids, StepScores
from florence_onnx.generation.search import DecodeStep, GeneratedSequence, initial_tokens, new_scorer
from florence_onnx.generation.token_scores import TokenScores, WholeDistribution

MOST_ROWS = MAX_BEAMS
"""Choices of one pass; more are asked in several, since a device has room for as many rows of a prompt as for beams."""


@dataclass(frozen=True)
class Choices:
    """Token sequences of which the answer is one, without start and end tokens; different, none empty."""

    token_ids: tuple[tuple[int, ...], ...]
    closing: tuple[int, ...] = ()
    """Tokens before which a choice is as complete as before an end token, such as the locations of a region."""

    def portions(self, max_rows: int | None = None) -> Iterator[Choices]:
        """At most `MOST_ROWS` of them at a time, or `max_rows` where that is less, in order."""
        size = min(MOST_ROWS, max_rows or MOST_ROWS)
        for start in range(0, len(self.token_ids), size):
            yield replace(self, token_ids=self.token_ids[start : start + size])

    def check(self, room: int, *, has_bos: bool) -> None:
        """Checks that the longest one fits.

        Args:
            room: Most tokens, end token included.
            has_bos: Whether the first of them is given.

        Raises:
            OptionsError: It does not.
        """
        needed = max(map(len, self.token_ids)) + 1 + has_bos
        if room < needed:
            raise OptionsError(f"constrain has a choice that takes {needed} tokens, but max_new_tokens is {room}")


@dataclass
class _Path:
    """The beginning of some choices: a row of the decoder."""

    choices: list[int]
    length: int
    log_prob: float
    scores: TokenScores | None


class _Trie:
    """The pass over the choices of one prompt."""

    def __init__(self, choices: Choices, config: SearchConfig, progress: Progress | None) -> None:
        self._progress = progress
        self._reason: StopReason | None = None
        self._choices, self._closing = choices.token_ids, choices.closing
        self._end_tokens = config.end_tokens
        self._given = tuple(initial_tokens(config))
        self._scorer = new_scorer(config)
        start = None if self._scorer is None else self._scorer.start(self._given)
        self._rows = [_Path(list(range(len(self._choices))), 0, 0.0, start)]
        self._log_probs = [0.0] * len(self._choices)
        self._answers: list[GeneratedSequence] = [GeneratedSequence((), False)] * len(self._choices)

    def advance(self, scores: StepScores, first_row: int) -> list[tuple[int, int]]:
        """Continues all rows by a token.

        Returns:
            Of each next row the row that it continues, from 0, and its token.
        """
        following: list[tuple[int, int]] = []
        rows: list[_Path] = []
        for row, path in enumerate(self._rows):
            # of the whole row: a choice need not be among the tokens that a device lists
            distribution = WholeDistribution(scores.logits(first_row + row, scores.num_tokens - 1))
            for token, choices in self._continuations(path).items():
                log_prob = path.log_prob + distribution.log_prob(token)
                found = path.scores and self._scorer and self._scorer.extend(path.scores, distribution, token)
                rows.append(_Path(choices, path.length + 1, log_prob, found or None))
                following.append((row, token))
            self._end(path, distribution)
        self._rows = rows
        if rows and self._progress is not None:
            # no token is certain before all choices are known
            self._reason = self._progress.after_step(lambda: self._given)
        return following

    @property
    def is_stopped(self) -> bool:
        """Whether it was ended before all choices were known."""
        return self._reason is not None

    def _continuations(self, path: _Path) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for choice in path.choices:
            tokens = self._choices[choice]
            if len(tokens) > path.length:
                found.setdefault(tokens[path.length], []).append(choice)
        return found

    def _end(self, path: _Path, distribution: WholeDistribution) -> None:
        """Ends the choice that a row is the whole of, if there is one, with the likelier end token."""
        for choice in path.choices:
            tokens = self._choices[choice]
            if len(tokens) == path.length:
                end = max(self._end_tokens, key=distribution.log_prob)
                self._log_probs[choice] = path.log_prob + self._completion(end, distribution)
                found = path.scores and self._scorer and self._scorer.extend(path.scores, distribution, end)
                self._answers[choice] = GeneratedSequence((*self._given, *tokens, end), False, scores=found or None)

    def _completion(self, end: int, distribution: WholeDistribution) -> float:
        """Log-probability that a choice is complete."""
        if not self._closing:
            return distribution.log_prob(end)
        each = [distribution.log_prob(token) for token in (end, *self._closing)]
        return max(each) + math.log(sum(math.exp(value - max(each)) for value in each))

    def result(self) -> GeneratedSequence:
        """See `ChoiceSearch.results`."""
        if self._reason is not None:
            scores = None if self._scorer is None else self._scorer.start(self._given)
            return GeneratedSequence(self._given, self._reason, scores=scores)
        choices = tuple(zip(self._choices, self._log_probs, strict=True))
        return replace(self._answers[0], alternatives=tuple(self._answers[1:]), choices=choices)


class ChoiceSearch:
    """Scores all choices; `choose` picks one."""

    def __init__(
        self,
        num_prompts: int,
        config: SearchConfig,
        choices: Choices,
        progress: Sequence[Progress] | None = None,
    ) -> None:
        """Args:
        num_prompts: Number of prompts.
        config: How to search; processors play no part.
        choices: At most `MOST_ROWS`.
        progress: As for `generate.new_search`; an answer that is ended early is none of the choices, but empty.
        """
        self._config = config
        follow: Sequence[Progress | None] = progress if progress is not None else [None] * num_prompts
        self._tries = [_Trie(choices, config, follow[index]) for index in range(num_prompts)]
        self._active = list(self._tries)
        self._num_rows = 1

    def start(self) -> Ids:
        return np.array([initial_tokens(self._config)] * len(self._tries), dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        # one trie, so that all prompts have as many rows at each depth
        width = self._num_rows
        following = [trie.advance(scores, index * width) for index, trie in enumerate(self._active)]
        self._num_rows = len(following[0])
        staying = [index for index, trie in enumerate(self._active) if not trie.is_stopped]
        if not self._num_rows or not staying:
            return None
        self._active = [self._active[index] for index in staying]
        rows = [index * width + row for index in staying for row, _ in following[index]]
        tokens = [[token] for index in staying for _, token in following[index]]
        return DecodeStep(np.array(rows), np.array(staying), np.array(tokens, dtype=np.int64))

    def results(self) -> list[GeneratedSequence]:
        """For each prompt all choices as answers, in their order: the first one, and the others as its alternatives.

        A prompt that was ended early has an answer without tokens and without choices.
        """
        return [trie.result() for trie in self._tries]


def choose(portions: Sequence[GeneratedSequence], config: SearchConfig) -> GeneratedSequence:
    """The answer among all choices, and as many alternatives as a configuration asks for.

    Args:
        portions: What `ChoiceSearch.results` has for one prompt, of each portion of the choices.
        config: With `do_sample` choices are drawn, with their probabilities at `temperature`, and none twice.

    Returns:
        The answer; where a portion was ended early that portion's, since the likeliest choice is not known.
    """
    for each in portions:
        if not each.choices:
            return each
    choices = tuple(pair for each in portions for pair in each.choices)
    answers = [replace(one, alternatives=(), choices=()) for each in portions for one in (each, *each.alternatives)]
    values = np.array([log_prob for _, log_prob in choices])
    count = min(config.num_return_sequences, len(values))
    if config.do_sample:
        scores = (values / config.temperature).astype(np.float32)
        order = draw_without_replacement(new_generator(config.seed, 0), scores, count)
    else:
        order = np.argsort(-values, kind="stable")[:count]
    first, *others = (answers[int(index)] for index in order)
    return replace(first, alternatives=tuple(others), choices=choices)
