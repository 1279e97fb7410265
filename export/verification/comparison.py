"""Comparing models: every question to every model with every search."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from florence_onnx.errors import InputError
from florence_onnx.generation.options import GenerationDefaults, GenerationOptions
from florence_onnx.generation.search import initial_tokens

from .agreement import Answer, Comparison, compare_answers, compare_logits
from .answerers import Answerer
from .questions import Question


@dataclass(frozen=True)
class Measured:
    """One answer of one candidate, compared with the reference's."""

    candidate: Answerer
    question: Question
    num_beams: int
    expected: Answer
    """The reference's answer."""
    answer: Answer
    """The candidate's answer."""
    comparison: Comparison


def resolve_searches(
    generation: GenerationDefaults, beams: Sequence[int], max_new_tokens: int | None
) -> list[GenerationOptions]:
    """Returns the options of every search with explicit limits, so that they mean the same to every model.

    Args:
        generation: The reference's defaults, for options that are not given.
        beams: Numbers of beams; empty means greedy and the reference's own number.
        max_new_tokens: Most tokens of an answer; None is the reference's limit.

    Raises:
        OptionsError: A number is out of range.
    """
    wanted = beams or (1, generation.resolve(None).num_beams)
    found = []
    for num_beams in dict.fromkeys(wanted):
        config = generation.resolve(GenerationOptions(num_beams, max_new_tokens))
        found.append(GenerationOptions(num_beams, config.max_length - 1))
    return found


def compare_models(
    reference: Answerer,
    candidates: Sequence[Answerer],
    questions: Iterable[Question],
    searches: Sequence[GenerationOptions],
) -> Iterator[Measured]:
    """Compares the answers and logits of every candidate with those of the reference.

    Args:
        reference: The model to compare with.
        candidates: The models to compare.
        questions: Images and prompts.
        searches: The options of each search; `num_beams` must be set.

    Yields:
        One comparison per question, search and candidate.

    Raises:
        InputError: A candidate's vocabulary has another size than the reference's.
    """
    for question in questions:
        for options in searches:
            num_given = len(initial_tokens(reference.generation.resolve(options)))
            expected = reference.answer(question, options)
            # Logits are compared along the reference's answer. After its first different token, the candidate's own
            # answer has another history, and a difference of logits would say nothing about precision.
            logits = reference.score(question, expected.token_ids)[num_given - 1 :]
            for candidate in candidates:
                answer = candidate.answer(question, options)
                found = candidate.score(question, expected.token_ids)[num_given - 1 :]
                if found.shape != logits.shape:
                    raise InputError(
                        f"{candidate.name} has a vocabulary of {found.shape[1]}, {reference.name} of {logits.shape[1]}: "
                        "they do not come from the same checkpoint"
                    )
                agreement = compare_logits(logits, found) if len(logits) else None
                comparison = compare_answers(expected, answer, num_given=num_given, logits=agreement)
                yield Measured(candidate, question, options.num_beams or 1, expected, answer, comparison)
