"""Greedy search, one token at a time or, where the session can verify drafts, several."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.prompt_lookup import PromptLookup
from florence_onnx.generation.scores import StepScores
from florence_onnx.generation.search import Continuation, GeneratedSequence, Ids, opening


class _Row:
    """The answer to one prompt."""

    def __init__(self, given: Sequence[int] | None, config: SearchConfig) -> None:
        self._config = config
        self.tokens = opening(config)
        self._processors = LogitsProcessors(config, self.tokens)
        self._lookup: PromptLookup | None = None
        if given is not None and config.prompt_lookup_num_tokens:
            self._lookup = PromptLookup(given, self.tokens, config.prompt_lookup_num_tokens)
        self._draft: list[int] = []
        self.answer: GeneratedSequence | None = None

    def take(self, scores: StepScores, row: int) -> int:
        """Chooses tokens while the drafted ones turn out to be the choice.

        Args:
            scores: A place for the last token and for each drafted one.
            row: This one's row in them.

        Returns:
            How many of the tokens that were fed belong to the answer.
        """
        num_kept = 0
        for drafted in (*self._draft, None):
            self._take_one(scores, row, num_kept)
            num_kept += 1
            if self.answer is not None or self.tokens[-1] != drafted:
                break
        if self._draft and self._lookup is not None:
            # of the tokens kept the first is no draft, and the last one may be the first choice to differ
            self._lookup.settle(num_kept - 1)
        return num_kept

    def _take_one(self, scores: StepScores, row: int, place: int) -> None:
        config, tokens = self._config, self.tokens
        at_limit = len(tokens) + 1 >= config.max_length
        unforced = scores.best_token(row, place) if at_limit else config.eos_token_id
        token = self._processors.forced(len(tokens))
        if token is None:
            token = scores.best_token(row, place, self._processors.banned(tokens))
        tokens.append(token)
        self._processors.add(tokens)
        if self._lookup is not None:
            self._lookup.append(token)
        if at_limit or token == config.eos_token_id:
            self.answer = GeneratedSequence(tuple(tokens), unforced != config.eos_token_id)

    def next_tokens(self) -> list[int]:
        """The last token and the draft of what may follow it."""
        self._draft = []
        if self._lookup is not None:
            room = self._config.max_length - 1 - len(self.tokens)  # the last token is never fed
            self._draft = self._lookup.draft(self.tokens, room, self._processors.banned)
        return [self.tokens[-1], *self._draft]


class GreedySearch:
    """Takes the most probable token at every step."""

    def __init__(self, num_prompts: int, config: SearchConfig, given: Sequence[Sequence[int]] | None = None) -> None:
        """Args:
        num_prompts: Number of answers.
        config: How to search.
        given: For each, token ids that it may repeat; None where the session cannot verify drafts.
        """
        self._rows = [_Row(None if given is None else given[i], config) for i in range(num_prompts)]
        self._active = list(self._rows)

    def start(self) -> Ids:
        return np.array([row.tokens for row in self._rows], dtype=np.int64)

    def advance(self, scores: StepScores) -> Continuation | None:
        active = self._active
        kept = [row.take(scores, place) for place, row in enumerate(active)]
        staying = [place for place, row in enumerate(active) if row.answer is None]
        if not staying:
            return None
        self._active = [active[place] for place in staying]
        rows = np.array(staying, dtype=np.int64)
        return Continuation(rows, rows, self._feed(), np.array(kept, dtype=np.int64) if scores.num_tokens > 1 else None)

    def _feed(self) -> Ids:
        """Drafts are padded with their row's last token to the length of the longest; the padding is never kept."""
        following = [row.next_tokens() for row in self._active]
        longest = max(map(len, following))
        return np.array([tokens + tokens[-1:] * (longest - len(tokens)) for tokens in following], dtype=np.int64)

    def results(self) -> list[GeneratedSequence]:
        return [row.answer for row in self._rows if row.answer is not None]
