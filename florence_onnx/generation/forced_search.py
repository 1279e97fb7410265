"""A search that chooses nothing: it follows given answers and records how probable the model finds their tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from florence_onnx.generation.scores import StepScores
from florence_onnx.generation.search import DecodeStep, GeneratedSequence, Ids
from florence_onnx.generation.token_scores import TokenScorer, WholeDistribution


class ForcedSearch:
    """Follows one given answer a prompt. Its results are those answers, with scores."""

    def __init__(self, answers: Sequence[Sequence[int]], num_given: int, scorer: TokenScorer) -> None:
        """Prepares one pass.

        Args:
            answers: Token ids of each prompt's answer from the decoder start token on, at least two.
            num_given: How many tokens at the beginning were not the model's choice, at least 1.
            scorer: Makes scores of the tokens' distributions.
        """
        self._answers = [list(answer) for answer in answers]
        self._num_given = num_given
        self._scorer = scorer
        self._scores = [scorer.start(answer[:1]) for answer in self._answers]
        self._active = list(range(len(self._answers)))
        self._length = 1

    def start(self) -> Ids:
        return np.array([answer[:1] for answer in self._answers], dtype=np.int64)

    def advance(self, scores: StepScores) -> DecodeStep | None:
        for row, index in enumerate(self._active):
            self._extend(index, scores, row)
        self._length += 1
        staying = [row for row, index in enumerate(self._active) if self._length < len(self._answers[index])]
        if not staying:
            return None
        self._active = [self._active[row] for row in staying]
        rows = np.array(staying, dtype=np.int64)
        fed = [[self._answers[index][self._length - 1]] for index in self._active]
        return DecodeStep(rows, rows, np.array(fed, dtype=np.int64))

    def _extend(self, index: int, scores: StepScores, row: int) -> None:
        """Adds the score of an answer's next token."""
        answer, known = self._answers[index], self._scores[index]
        if self._length < self._num_given:
            self._scores[index] = self._scorer.start(answer[: self._length + 1])
            return
        # all logits: a token that the model would not choose need not be among the top-k of a device
        distribution = WholeDistribution(scores.logits(row, 0))
        self._scores[index] = self._scorer.extend(known, distribution, answer[self._length])

    def results(self) -> list[GeneratedSequence]:
        return [
            GeneratedSequence(tuple(answer), False, scores=scores)
            for answer, scores in zip(self._answers, self._scores, strict=True)
        ]
