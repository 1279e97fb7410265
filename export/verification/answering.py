"""Who is asked when two models are compared: a bundle on ONNX Runtime, or a checkpoint in transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import InputError
from florence_onnx.generation.options import GenerationDefaults, GenerationOptions
from florence_onnx.generation.search import initial_tokens
from florence_onnx.images import preprocessing
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.tasks import parse

from .agreement import Answer, Comparison, compare_answers, compare_logits
from .questions import NamedImage, Question

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from .reference import Encoded

Floats = npt.NDArray[np.float32]

_RECENT = 64
"""Answers kept: those of one image, which its other questions are made of."""


class Answerer(Protocol):
    """A model that answers questions."""

    name: str
    """As the user gave it."""
    precision: str
    """`fp32` of a checkpoint."""
    generation: GenerationDefaults
    """How it decodes where nothing else is asked for."""

    def answer(self, question: Question, options: GenerationOptions) -> Answer:
        """Asks."""

    def score(self, question: Question, token_ids: tuple[int, ...]) -> Floats:
        """Logits `(L - 1, V)` at every position of a given answer of L tokens."""


class BundleAnswerer:
    """A bundle on ONNX Runtime."""

    def __init__(self, name: str, bundle: Bundle, *, device: str = "auto") -> None:
        self.name = name
        self.precision = bundle.precision
        self.generation = bundle.generation
        self._model = Florence2.from_bundle(bundle, LoadOptions(device=device))
        # an image is encoded once for all its questions, and searches that give the same tokens are scored once
        self._encode: Callable[[NamedImage], EncodedImage] = functools.lru_cache(1)(
            lambda image: self._model.encode(image.image)
        )
        self.answer = functools.lru_cache(_RECENT)(self._answer)
        self.score = functools.lru_cache(1)(self._score)

    def _answer(self, question: Question, options: GenerationOptions) -> Answer:
        prediction = self._model.run(
            question.task,
            self._encode(question.image),
            text_input=question.text_input,
            region=question.region,
            options=options,
        )
        return Answer(prediction.token_ids, prediction.text, prediction.results, question.image.size)

    def _score(self, question: Question, token_ids: tuple[int, ...]) -> Floats:
        encoded = self._encode(question.image)
        given = {"text_input": question.text_input, "region": question.region}
        return self._model.score_tokens(question.task, encoded, token_ids, **given)  # type: ignore[arg-type]


class CheckpointAnswerer:
    """A checkpoint in transformers, in fp32 on the CPU."""

    precision = "fp32"

    def __init__(self, name: str, checkpoint: Checkpoint, generation: GenerationDefaults) -> None:
        from . import reference

        self.name = name
        self.generation = generation
        self._reference = reference
        self._checkpoint = checkpoint
        self._encode: Callable[[Question], Encoded] = functools.lru_cache(1)(self._run_encoder)
        self.answer = functools.lru_cache(_RECENT)(self._answer)
        self.score = functools.lru_cache(1)(self._score)

    def _run_encoder(self, question: Question) -> Encoded:
        inputs = self._checkpoint.preprocessing
        pixel_values = preprocessing.preprocess(
            question.image.image, size=inputs.image_size, mean=inputs.image_mean, std=inputs.image_std
        )
        return self._reference.encode(self._checkpoint, pixel_values, [question.prompt])

    def _answer(self, question: Question, options: GenerationOptions) -> Answer:
        (token_ids,) = self._reference.search(self._checkpoint, self._encode(question), options)
        text: str = self._checkpoint.tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return Answer(token_ids, text, parse(question.task, text, question.image.size), question.image.size)

    def _score(self, question: Question, token_ids: tuple[int, ...]) -> Floats:
        return self._reference.score(self._checkpoint, self._encode(question), token_ids)


def open_bundle(name: str, *, precision: str | None = None, device: str = "auto") -> BundleAnswerer:
    """Loads a bundle by its directory, its name on the hub, or `demo`.

    Raises:
        FlorenceError: It cannot be used.
    """
    return BundleAnswerer(name, hub.resolve(name, precision=precision), device=device)


def is_bundle(name: str) -> bool:
    """Whether a reference is a bundle; anything else (another folder, a hub id) is taken for a checkpoint."""
    path = Path(name)
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    is_transformers_js = (path / "onnx").is_dir() and not has_weights
    is_own = (path / bundles.DESCRIPTION).is_file() or bundles.choose(path, None) is not None
    return name == bundles.DEMO or is_own or is_transformers_js


def open_reference(name: str, generation: GenerationDefaults, *, device: str = "auto") -> Answerer:
    """Loads what others are compared with.

    Args:
        name: An fp32 bundle, or the folder or hub id of a checkpoint.
        generation: Of a bundle that was exported from it: a checkpoint states its own less completely.
        device: For a bundle.

    Raises:
        FlorenceError: It cannot be used.
        InputError: It is a bundle of another precision.
    """
    if not is_bundle(name):
        from ..checkpoints.checkpoint import load_checkpoint

        return CheckpointAnswerer(name, load_checkpoint(name), generation)
    has_several = bundles.choose(Path(name), None) is not None
    found = open_bundle(name, precision="fp32" if has_several else None, device=device)
    if found.precision != "fp32":
        raise InputError(
            f"the reference {name} has precision {found.precision}; give the checkpoint or its export in fp32"
        )
    return found


# ----------------------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Measured:
    """One answer of one candidate, compared."""

    candidate: Answerer
    question: Question
    num_beams: int
    expected: Answer
    answer: Answer
    comparison: Comparison


def resolve_searches(
    generation: GenerationDefaults, beams: Sequence[int], max_new_tokens: int | None
) -> list[GenerationOptions]:
    """Options that mean the same to every model.

    Args:
        generation: The reference's defaults, for what is not given.
        beams: Numbers of beams; none means greedy and the checkpoint's own.
        max_new_tokens: Limit of every answer.

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
    """Asks everyone everything and compares answers and logits with the reference's.

    Args:
        reference: The measure.
        candidates: Who is measured.
        questions: What is asked.
        searches: How answers are decoded; `num_beams` must be given.

    Yields:
        One comparison per question, search and candidate.

    Raises:
        InputError: A candidate's vocabulary is not the reference's.
    """
    for question in questions:
        for options in searches:
            num_given = len(initial_tokens(reference.generation.resolve(options)))
            expected = reference.answer(question, options)
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
