"""Images and prompts to tokens: the interface for host and device, what both share, and the way through the host."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image as PILImage

from florence_onnx.bundles.bundle import ModelSizes
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.generation.generate import drive
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Clock, Progress, stop_error
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search, unstarted
from florence_onnx.images import decoding, preprocessing
from florence_onnx.images.decoding import ImageInput
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.engine import Engine

T = TypeVar("T")
AnyImage = ImageInput | EncodedImage
Key = str | int
Seen = EncodedImage | PILImage.Image
"""An encoded image, or a loaded one that was not encoded, since all answers about it were ended before."""
Answer = tuple[Seen, GeneratedSequence]
Failed = Callable[[Sequence[int], FlorenceError], None]
"""Takes the indices of the prompts about one image, and the error that concerns them."""


class Answering(Protocol):
    """The three graphs of a model behind one interface: images and prompts in, tokens out."""

    def check(self, config: SearchConfig) -> None:
        """Checks that the graphs can run a search.

        Raises:
            OptionsError: It feeds more tokens in one step than the graphs take.
        """

    def encode(self, image: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on a loaded RGB image; the result refers to that image, without a copy."""

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on `pixel_values` `(1, 3, H, W)` of an image."""

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
        failed: Failed,
        progress: Sequence[Progress] | None = None,
    ) -> list[Answer | None]:
        """Answers P prompts, each about one image; an image that occurs several times is encoded once.

        Args:
            images: The image of each prompt.
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens, 0 for padding.
            new_search: Makes a search for prompts by their indices; called again when decoding starts over.
            failed: Called with an error that concerns one image only, and the indices of the prompts about it; may raise.
            progress: What may end each answer before it is begun, and is told the size of its image; that `new_search` has them
                is up to the caller. None: nothing.

        Returns:
            The image and the tokens of each prompt; None for those that `failed` was told of.

        Raises:
            ProviderError: The device failed while decoding.
        """


class HostAnswering:
    """All tensors pass through the host between two runs; the prompts of one call are decoded as one batch."""

    def __init__(self, sizes: ModelSizes, vision_encoder: Engine, text_model: TextBackend) -> None:
        self._sizes = sizes
        self._vision_encoder = vision_encoder
        self._text_model = text_model
        self._encoding_time = EncodingTime()

    def check(self, config: SearchConfig) -> None:
        """Accepts every search: the graphs take any number of tokens."""

    def encode(self, image: PILImage.Image) -> EncodedImage:
        return self.encode_pixels(preprocess(self._sizes, image), image)

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        features = self._encoding_time.of(
            lambda: self._vision_encoder.run({"pixel_values": pixel_values})["image_features"]
        )
        return EncodedImage(np.asarray(features[0], dtype=np.float32), image)

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
        failed: Failed,
        progress: Sequence[Progress] | None = None,
    ) -> list[Answer | None]:
        progress = progress or [Progress() for _ in images]
        seen = self._encode_all(images, failed, progress)
        answers: list[Answer | None] = [None] * len(images)
        encoded: dict[int, EncodedImage] = {}
        for row in sorted(seen):
            image = seen[row]
            if isinstance(image, EncodedImage) and progress[row].reason() is None:
                encoded[row] = image
            else:
                answers[row] = image, not_begun(new_search([row]), progress[row])
        rows = list(encoded)
        if not rows:
            return answers
        mask = attention_mask[rows]
        length = int(mask.sum(axis=1).max())
        image_features = np.stack([encoded[row].image_features for row in rows])
        session = self._text_model.start(input_ids[rows, :length], mask[:, :length], image_features)
        for row, sequence in zip(rows, drive(session, new_search(rows)), strict=True):
            answers[row] = encoded[row], sequence
        return answers

    def _encode_all(self, images: Sequence[AnyImage], failed: Failed, progress: Sequence[Progress]) -> dict[int, Seen]:
        """The image of each prompt, by the prompt's index; without those that `failed` was told of."""
        # One image a run: a batch is no faster on a CPU, and an int8 encoder has one scale for the activations of a
        # whole batch (DynamicQuantizeMatMul), so that an image's features would depend on the images beside it.
        seen: dict[int, Seen] = {}
        for indices in prompts_by_image(images).values():
            about = [progress[index] for index in indices]
            try:
                found = self._see(images[indices[0]], about)
            except FlorenceError as error:
                failed(indices, error)
            else:
                tell_size(about, found)
                seen.update(dict.fromkeys(indices, found))
        return seen

    def _see(self, image: AnyImage, progress: Sequence[Progress]) -> Seen:
        if isinstance(image, EncodedImage):
            return check_features(self._sizes, image)
        refuse_if_all_raise(progress)
        loaded = load(image)
        return loaded if is_hopeless(progress, self._encoding_time.least) else self.encode(loaded)


class EncodingTime:
    """The least time that the vision encoder took so far: what a call must have left for the encoder to be worth its run."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self.least = 0.0
        """Seconds; 0 before the first run."""

    def of(self, run: Callable[[], T]) -> T:
        """Measures a run and returns its result."""
        begin = self._clock()
        result = run()
        seconds = self._clock() - begin
        self.least = min(self.least or seconds, seconds)
        return result


def source_image(seen: Seen) -> PILImage.Image:
    """The image itself, RGB."""
    return seen.source_image if isinstance(seen, EncodedImage) else seen


def is_hopeless(progress: Sequence[Progress], seconds: float = 0.0) -> bool:
    """Whether none of the answers about an image can begin: each has to end within the `seconds` that encoding takes."""
    reasons = [each.reason(seconds) for each in progress]  # all are asked, since a reason stays
    return bool(reasons) and None not in reasons


def refuse_if_all_raise(progress: Sequence[Progress]) -> None:
    """Spares the reading of an image where every answer about it would be an error anyway.

    Raises:
        DeadlineError: All have to end, and the first for its deadline.
        CancelledError: All have to end, and the first because it was cancelled.
    """
    if all(each.raises for each in progress) and is_hopeless(progress):
        reason = progress[0].reason()
        assert reason is not None, "hopeless for a reason"
        raise stop_error(reason)


def tell_size(progress: Sequence[Progress], image: Seen) -> None:
    """Tells those who follow the answers about an image how large it is."""
    for each in progress:
        each.image_size = image.size


def not_begun(search: Search, progress: Progress) -> GeneratedSequence:
    """The answer to a prompt that has to end before its first decode step: no tokens but the first."""
    reason = progress.reason()
    assert reason is not None, "only an answer that has to end is not begun"
    return unstarted(search, reason)


def raise_error(indices: Sequence[int], error: FlorenceError) -> None:
    """A `Failed` for calls that end with the first error."""
    raise error


def load(image: ImageInput) -> PILImage.Image:
    """Loads an image as RGB, and copies it where it would be the caller's own object, which may change later."""
    return decoding.load(image, copy=True)


def preprocess(sizes: ModelSizes, image: PILImage.Image) -> Floats:
    """The `pixel_values` of an RGB image, `(1, 3, H, W)` float32."""
    return preprocessing.preprocess(image, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)


def to_image(pixel_values: Floats, sizes: ModelSizes) -> PILImage.Image:
    """The image that `pixel_values` `(3, H, W)` show: the inverse of `preprocess`, except that the size stays the model's."""
    scaled = pixel_values.transpose(1, 2, 0) * np.asarray(sizes.image_std) + np.asarray(sizes.image_mean)
    return PILImage.fromarray(np.clip(np.rint(scaled * 255), 0, 255).astype(np.uint8))


def check_features(sizes: ModelSizes, encoded: EncodedImage) -> EncodedImage:
    """Returns an encoded image whose features have the shape of this model's.

    Raises:
        InputError: They have another shape, so another model has encoded the image.
    """
    shape = encoded.stored.shape
    if shape != (sizes.num_image_tokens, sizes.width):
        raise InputError(
            f"this image was encoded by another model: its features are {shape}, here they are "
            f"{(sizes.num_image_tokens, sizes.width)}; encode it again"
        )
    return encoded


def prompts_by_image(images: Sequence[AnyImage]) -> dict[Key, list[int]]:
    """Indices of the prompts about each distinct image, by `image_key`, in the order of first occurrence."""
    indices: dict[Key, list[int]] = {}
    for index, image in enumerate(images):
        indices.setdefault(image_key(image), []).append(index)
    return indices


def image_key(image: AnyImage) -> Key:
    """The same for two images that need encoding only once: equal paths or URLs, or the same object."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)
