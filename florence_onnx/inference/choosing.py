"""Answers that are one of some choices: as many passes as the choices need, then the likeliest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from florence_onnx.errors import FlorenceError
from florence_onnx.generation.choice_search import Choices, choose
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.search import GeneratedSequence, Ids, Search
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import Answer, Answering, AnyImage, Failed
from florence_onnx.prediction import EncodedImage

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
) -> list[Answer | None]:
    """As `Answering.answer`, for any configuration."""
    if not isinstance(config.constrain, Choices):
        return answering.answer(
            images, input_ids, attention_mask, lambda rows: make_search(rows, config), preparation, failed
        )
    encoded: dict[int, AnyImage] = dict(enumerate(images))
    portions: dict[int, list[GeneratedSequence]] = {row: [] for row in encoded}
    for portion in config.constrain.portions(answering.max_rows):
        # those that a first portion has encoded are not encoded again, and those that have failed are not tried again
        rows = list(encoded)
        if not rows:
            break
        own = replace(config, constrain=portion)
        found = answering.answer(
            [encoded[row] for row in rows],
            input_ids[rows],
            attention_mask[rows],
            _of_rows(make_search, rows, own),
            preparation,
            _told_of(failed, rows),
        )
        encoded = {row: each[0] for row, each in zip(rows, found, strict=True) if each is not None}
        for row, each in zip(rows, found, strict=True):
            if each is not None:
                portions[row].append(each[1])
    return [_chosen(encoded.get(row), portions[row], config) for row in range(len(images))]


def _chosen(image: AnyImage | None, portions: Sequence[GeneratedSequence], config: SearchConfig) -> Answer | None:
    return (image, choose(portions, config)) if isinstance(image, EncodedImage) else None


def _of_rows(make_search: MakeSearch, rows: Sequence[int], config: SearchConfig) -> Callable[[Sequence[int]], Search]:
    return lambda places: make_search([rows[place] for place in places], config)


def _told_of(failed: Failed, rows: Sequence[int]) -> Failed:
    def tell(places: Sequence[int], error: FlorenceError) -> None:
        failed([rows[place] for place in places], error)

    return tell
