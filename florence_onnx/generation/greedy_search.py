"""Greedy search: one token per decoder call, or several where the session can verify drafts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from florence_onnx.generation.dense_processors import DenseProcessors
from florence_onnx.generation.logits_processors import LogitsProcessors
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress
from florence_onnx.generation.prompt_lookup import PromptLookup
from florence_onnx.generation.scores import StepScores
from florence_onnx.generation.search import (
    DecodeStep,
    GeneratedSequence,
    Ids,
    constrained_row,
    initial_tokens,
    new_scorer,
    would_end,
)


class _Row:
    """The answer to one prompt while it grows."""

    def __init__(
        self,
        lookup_ids: Sequence[int] | None,
        config: SearchConfig,
        encoder_ids: Sequence[int],
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self._config = config
        self._end_tokens = config.end_tokens
        self.tokens = initial_tokens(config)
        self._processors = LogitsProcessors(config, self.tokens, encoder_ids)
        self._dense = DenseProcessors(config, self._processors, encoder_ids) if config.is_dense else None
        self._lookup: PromptLookup | None = None
        if lookup_ids is not None and config.prompt_lookup_num_tokens:
            self._lookup = PromptLookup(lookup_ids, self.tokens, config.prompt_lookup_num_tokens)
        self._draft: list[int] = []
        self._constrained = constrained_row(config, self.tokens)
        self._scorer = new_scorer(config)
        self._scores = None if self._scorer is None else self._scorer.start(self.tokens)
        self.answer: GeneratedSequence | None = None

    def advance(self, scores: StepScores, row: int) -> int:
        """Appends a token, and another one for each draft that turns out to be the greedy choice.

        Args:
            scores: Scores with a position for the last token and for each drafted one.
            row: Index of this row in them.

        Returns:
            How many of the fed tokens belong to the answer: the first and the accepted drafts.
        """
        num_kept = 0
        for drafted in (*self._draft, None):
            self._append_best(scores, row, num_kept)
            num_kept += 1
            # all scores behind a rejected draft were computed from a history with that wrong token in it
            if self.answer is not None or self.tokens[-1] != drafted:
                break
        if self._draft and self._lookup is not None:
            self._lookup.record(num_kept - 1)  # the first token fed was no draft
        self._report()
        return num_kept

    def _report(self) -> None:
        if self._progress is None or self.answer is not None:
            return
        reason = self._progress.after_step(lambda: tuple(self.tokens))
        if reason is not None:
            self.answer = GeneratedSequence(tuple(self.tokens), reason, scores=self._scores)

    def _append_best(self, scores: StepScores, row: int, position: int) -> None:
        config, tokens = self._config, self.tokens
        at_limit = len(tokens) + 1 >= config.max_length
        # `forced_eos_token_id` ends the answer at the limit in any case. What the model would have chosen freely tells
        # whether the answer was complete.
        token = self._best(scores, row, position)
        has_ended = at_limit or token in self._end_tokens
        is_whole = has_ended and would_end(config, self._constrained, scores, row, position, at_limit=at_limit)
        if self._scorer is not None and self._scores is not None:
            self._scores = self._scorer.extend(self._scores, scores.distribution(row, position), token)
        tokens.append(token)
        self._processors.add(tokens)
        if self._constrained is not None:
            self._constrained.append(token)
        if self._lookup is not None:
            self._lookup.append(token)
        if has_ended:
            self.answer = GeneratedSequence(tuple(tokens), not is_whole, scores=self._scores)

    def _best(self, scores: StepScores, row: int, position: int) -> int:
        if self._dense is not None:
            allowed = None if self._constrained is None else self._constrained.allowed()
            return int(self._dense(self.tokens, scores.logits(row, position).copy(), allowed=allowed).argmax())
        token = self._processors.forced(len(self.tokens))
        if token is not None:
            return token
        banned = self._processors.banned(self.tokens)
        if self._constrained is None:
            return scores.best_token(row, position, banned)
        return scores.best_allowed_token(row, position, self._constrained.allowed(banned))

    def next_tokens(self) -> list[int]:
        """The last token and the draft of what may follow it."""
        self._draft = []
        if self._lookup is not None:
            room = self._config.max_length - 1 - len(self.tokens)  # the last token of an answer is never fed
            self._draft = self._lookup.draft(self.tokens, room, self._processors.banned)
            if self._constrained is not None:
                self._draft = self._constrained.possible(self._draft)
        return [self.tokens[-1], *self._draft]


class GreedySearch:
    """Takes the most probable token at every step."""

    def __init__(
        self,
        num_prompts: int,
        config: SearchConfig,
        lookup_ids: Sequence[Sequence[int]] | None = None,
        encoder_ids: Sequence[Sequence[int]] | None = None,
        progress: Sequence[Progress] | None = None,
    ) -> None:
        """Starts an empty answer for each prompt.

        Args:
            num_prompts: Number of prompts.
            config: How to search.
            lookup_ids: For each prompt the token ids that its answer may repeat; None where the session cannot verify
                drafts.
            encoder_ids: For each prompt the token ids that the text encoder was fed.
            progress: As for `generate.new_search`.
        """
        self._rows = [
            _Row(
                None if lookup_ids is None else lookup_ids[i],
                config,
                () if encoder_ids is None else encoder_ids[i],
                None if progress is None else progress[i],
            )
            for i in range(num_prompts)
        ]
        self._active = list(self._rows)

    def start(self) -> Ids:
        return np.array([row.tokens for row in self._rows], dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        active = self._active
        num_kept = [row.advance(scores, index) for index, row in enumerate(active)]
        staying = [index for index, row in enumerate(active) if row.answer is None]
        if not staying:
            return None
        self._active = [active[index] for index in staying]
        rows = np.array(staying, dtype=np.int64)
        kept = np.array(num_kept, dtype=np.int64) if scores.num_tokens > 1 else None
        return DecodeStep(rows, rows, self._next_tokens(), kept)

    def _next_tokens(self) -> Ids:
        """The tokens `(R, S)` fed next. Shorter drafts are padded with their last token; padding is never accepted."""
        following = [row.next_tokens() for row in self._active]
        longest = max(map(len, following))
        return np.array([tokens + tokens[-1:] * (longest - len(tokens)) for tokens in following], dtype=np.int64)

    def results(self) -> list[GeneratedSequence]:
        return [row.answer for row in self._rows if row.answer is not None]
