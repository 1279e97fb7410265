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

    def __init__(self, choices: Choices, config: SearchConfig) -> None:
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
        return following

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
        choices = tuple(zip(self._choices, self._log_probs, strict=True))
        return replace(self._answers[0], alternatives=tuple(self._answers[1:]), choices=choices)


class ChoiceSearch:
    """Scores all choices; `choose` picks one."""

    def __init__(self, num_prompts: int, config: SearchConfig, choices: Choices) -> None:
        """Args:
        num_prompts: Number of prompts.
        config: How to search; processors play no part.
        choices: At most `MOST_ROWS`.
        """
        self._config = config
        self._tries = [_Trie(choices, config) for _ in range(num_prompts)]
        self._num_rows = 1

    def start(self) -> Ids:
        return np.array([initial_tokens(self._config)] * len(self._tries), dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        # one trie, so that all prompts have as many rows at each depth
        width = self._num_rows
        following = [trie.advance(scores, index * width) for index, trie in enumerate(self._tries)]
        self._num_rows = len(following[0])
        if not self._num_rows:
            return None
        rows = [index * width + row for index, found in enumerate(following) for row, _ in found]
        tokens = [[token] for found in following for _, token in found]
        return DecodeStep(np.array(rows), np.arange(len(self._tries)), np.array(tokens, dtype=np.int64))

    def results(self) -> list[GeneratedSequence]:
        """For each prompt all choices as answers, in their order: the first one, and the others as its alternatives."""
        return [trie.result() for trie in self._tries]


def choose(portions: Sequence[GeneratedSequence], config: SearchConfig) -> GeneratedSequence:
    """The answer among all choices, and as many alternatives as a configuration asks for.

    Args:
        portions: What `ChoiceSearch.results` has for one prompt, of each portion of the choices.
        config: With `do_sample` choices are drawn, with their probabilities at `temperature`, and none twice.
    """
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
