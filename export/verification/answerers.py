"""Models to compare, behind one interface: a bundle on ONNX Runtime, or a checkpoint in transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import Bundle
from florence_onnx.errors import InputError
from florence_onnx.generation.options import GenerationDefaults, GenerationOptions
from florence_onnx.images import preprocessing
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.load_options import LoadOptions
from florence_onnx.tasks import parse

from .agreement import Answer
from .questions import NamedImage, Question

if TYPE_CHECKING:
    from ..checkpoints.checkpoint import Checkpoint
    from .reference import Encoded

Floats = npt.NDArray[np.float32]

_RECENT = 64
"""Answers that are cached: enough for one image, whose questions are made from other answers about it."""


class Answerer(Protocol):
    """A model that answers questions."""

    name: str
    """The name as the user gave it."""
    precision: str
    """Precision of the bundle; `fp32` for a checkpoint."""
    generation: GenerationDefaults
    """Its generation defaults."""

    def answer(self, question: Question, options: GenerationOptions) -> Answer:
        """Generates the answer to a question."""

    def score(self, question: Question, token_ids: tuple[int, ...]) -> Floats:
        """Returns the logits `(L - 1, V)` at every position of a given answer of L tokens."""


class BundleAnswerer:
    """A bundle on ONNX Runtime."""

    def __init__(self, name: str, bundle: Bundle, *, device: str = "auto") -> None:
        self.name = name
        self.precision = bundle.precision
        self.generation = bundle.generation
        self._model = Florence2.from_bundle(bundle, LoadOptions(device=device))
        # An image is encoded once for all its questions, and searches that give the same tokens are scored once.
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
    """Loads a bundle from a directory, a hub repository, or `demo`.

    Raises:
        FlorenceError: The bundle is missing or cannot be loaded.
    """
    return BundleAnswerer(name, hub.resolve(name, precision=precision), device=device)


def is_bundle(name: str) -> bool:
    """Whether a name is that of a bundle; anything else (another folder, a hub id) is taken for a checkpoint."""
    path = Path(name)
    has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.bin"))
    is_transformers_js = (path / "onnx").is_dir() and not has_weights
    is_own = (path / bundles.DESCRIPTION).is_file() or bundles.choose(path, None) is not None
    return name == bundles.DEMO or is_own or is_transformers_js


def open_reference(name: str, generation: GenerationDefaults, *, device: str = "auto", **parts: str | None) -> Answerer:
    """Loads the model that the others are compared with.

    Args:
        name: An fp32 bundle, or the folder or hub id of a checkpoint.
        generation: The generation defaults of a bundle that was exported from the checkpoint; used if `name` is a
            checkpoint.
        device: The device of a bundle.
        parts: Arguments of `load_checkpoint`: where the parts of a checkpoint come from.

    Raises:
        FlorenceError: The bundle or checkpoint is missing or cannot be loaded.
        InputError: It is a bundle of another precision, or one with `parts`.
    """
    if not is_bundle(name):
        from ..checkpoints.checkpoint import load_checkpoint

        return CheckpointAnswerer(name, load_checkpoint(name, **parts), generation)
    given = [f"--{part}" for part, value in parts.items() if value is not None]
    if given:
        raise InputError(f"{' and '.join(given)} go with a checkpoint as reference; {name} is a bundle")
    has_several = bundles.choose(Path(name), None) is not None
    found = open_bundle(name, precision="fp32" if has_several else None, device=device)
    if found.precision != "fp32":
        raise InputError(
            f"the reference {name} has precision {found.precision}; give the checkpoint or its export in fp32"
        )
    return found
