"""Answers that are one of some choices: as many passes as the choices need, then the likeliest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from florence_onnx.errors import FlorenceError
from florence_onnx.generation.choice_search import Choices, choose
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress
from florence_onnx.generation.search import GeneratedSequence, Ids, Search, new_scorer
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import Answer, Answering, AnyImage, Failed
from florence_onnx.inference.ending import Seen

MakeSearch = Callable[[Sequence[int], SearchConfig], Search]
"""Makes a search for prompts by their indices."""


def answer(
    answering: Answering,
    images: Sequence[AnyImage],
    input_ids: Ids,
    attention_mask: Ids,
    config: SearchConfig,
    make_search: MakeSearch,
    preparation: Preparation,
    failed: Failed,
    progress: Sequence[Progress] | None = None,
) -> list[Answer | None]:
    """As `Answering.answer`, for any configuration; `make_search` makes searches that report to `progress`."""
    progress = progress or [Progress() for _ in images]
    if not isinstance(config.constrain, Choices):
        answers = answering.answer(
            images, input_ids, attention_mask, lambda rows: make_search(rows, config), preparation, failed, progress
        )
        return [answer and (answer[0], _with_scores(answer[1], config)) for answer in answers]
    asked: dict[int, AnyImage] = dict(enumerate(images))
    seen: dict[int, Seen] = {}
    portions: dict[int, list[GeneratedSequence]] = {row: [] for row in asked}
    for portion in config.constrain.portions(answering.max_rows):
        # those that a first portion has encoded are not encoded again; those that have failed or ended are not asked again
        rows = list(asked)
        if not rows:
            break
        own = replace(config, constrain=portion)
        found = answering.answer(
            [asked[row] for row in rows],
            input_ids[rows],
            attention_mask[rows],
            _of_rows(make_search, rows, own),
            preparation,
            _told_of(failed, rows),
            [progress[row] for row in rows],
        )
        asked = {}
        for row, each in zip(rows, found, strict=True):
            if each is None:
                seen.pop(row, None)
                continue
            seen[row], sequence = each
            portions[row].append(sequence)
            if sequence.choices:
                asked[row] = seen[row]
    return [_chosen(seen.get(row), portions[row], config) for row in range(len(images))]


def _chosen(image: Seen | None, portions: Sequence[GeneratedSequence], config: SearchConfig) -> Answer | None:
    return None if image is None else (image, _with_scores(choose(portions, config), config))


def _with_scores(sequence: GeneratedSequence, config: SearchConfig) -> GeneratedSequence:
    """An answer with scores if they are asked for: one that was ended before it began has none yet."""
    scorer = new_scorer(config)
    if scorer is None or sequence.scores is not None:
        return sequence
    return replace(sequence, scores=scorer.start(sequence.token_ids))


def _of_rows(make_search: MakeSearch, rows: Sequence[int], config: SearchConfig) -> Callable[[Sequence[int]], Search]:
    return lambda places: make_search([rows[place] for place in places], config)


def _told_of(failed: Failed, rows: Sequence[int]) -> Failed:
    def tell(places: Sequence[int], error: FlorenceError) -> None:
        failed([rows[place] for place in places], error)

    return tell
