"""Models to compare, behind one interface: a bundle on ONNX Runtime, or a checkpoint in transformers."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from florence_onnx.bundles import bundle as bundles
from florence_onnx.bundles import hub
from florence_onnx.bundles.bundle import Bundle, size_name
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

T = TypeVar("T")

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


@dataclass(frozen=True)
class Timing:
    """Medians of what a model took on this machine."""

    vision_seconds: float
    """Of encoding an image, preprocessing included."""
    decoding_seconds: float
    """Of an answer about an encoded image."""


class Stopwatch:
    """Seconds that a model took."""

    def __init__(self) -> None:
        self._vision: list[float] = []
        self._decoding: dict[int, list[float]] = defaultdict(list)

    def time_vision(self, function: Callable[[], T]) -> T:
        """Calls a function that encodes an image."""
        return _time(function, self._vision)

    def time_decoding(self, num_beams: int, function: Callable[[], T]) -> T:
        """Calls a function that decodes an answer."""
        return _time(function, self._decoding[num_beams])

    def timing(self, num_beams: int) -> Timing | None:
        """Median seconds for an image and for an answer; None where nothing was answered."""
        vision, decoding = self._vision, self._decoding[num_beams]
        return Timing(statistics.median(vision), statistics.median(decoding)) if vision and decoding else None


def _time(function: Callable[[], T], seconds: list[float]) -> T:
    begin = time.perf_counter()
    result = function()
    seconds.append(time.perf_counter() - begin)
    return result


class BundleAnswerer:
    """A bundle on ONNX Runtime, at one of its image sizes."""

    def __init__(self, name: str, bundle: Bundle, model: Florence2) -> None:
        """Args:
        name: As the user gave it; with the image size where the bundle has several.
        bundle: The bundle, resized to the image size.
        model: The loaded bundle, which other sizes may share.
        """
        self.name = name
        self.precision = bundle.precision
        self.generation = bundle.generation
        self.image_size = bundle.sizes.image_size
        """`(width, height)` in pixels at which it reads images."""
        self.stopwatch = Stopwatch()
        self._model = model
        # An image is encoded once for all its questions, and searches that give the same tokens are scored once.
        self._encode: Callable[[NamedImage], EncodedImage] = functools.lru_cache(1)(self._run_encoder)
        self.answer = functools.lru_cache(_RECENT)(self._answer)
        self.score = functools.lru_cache(1)(self._score)

    def _run_encoder(self, image: NamedImage) -> EncodedImage:
        return self.stopwatch.time_vision(lambda: self._model.encode(image.image, image_size=self.image_size))

    def _answer(self, question: Question, options: GenerationOptions) -> Answer:
        encoded = self._encode(question.image)
        prediction = self.stopwatch.time_decoding(
            options.num_beams or 1,
            lambda: self._model.run(
                question.task, encoded, text_input=question.text_input, region=question.region, options=options
            ),
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
    """Loads a bundle from a directory, a hub repository, or `demo`, for its default image size.

    Raises:
        FlorenceError: The bundle is missing or cannot be loaded.
    """
    bundle = hub.resolve(name, precision=precision)
    return BundleAnswerer(name, bundle, Florence2.from_bundle(bundle, LoadOptions(device=device)))


def open_sizes(
    name: str,
    image_sizes: Sequence[tuple[int, int]] = (),
    *,
    precision: str | None = None,
    device: str = "auto",
) -> list[BundleAnswerer]:
    """Loads a bundle once, to answer at each of several image sizes.

    Args:
        name: As for `open_bundle`.
        image_sizes: `(width, height)` in pixels; empty for all that the bundle has.
        precision: As for `open_bundle`.
        device: As for `open_bundle`.

    Raises:
        FlorenceError: The bundle is missing or cannot be loaded.
        InputError: It has no such image size.
    """
    bundle = hub.resolve(name, precision=precision)
    found = [bundle.resized(size) for size in image_sizes or bundle.image_sizes]
    model = Florence2.from_bundle(found[0], LoadOptions(device=device))
    has_several = len(bundle.image_sizes) > 1
    return [
        BundleAnswerer(f"{name}, {size_name(each.sizes.image_size)}" if has_several else name, each, model)
        for each in found
    ]


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
