"""Images and prompts to tokens: the interface for host and device, what both share, and the way through the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image as PILImage

from florence_onnx.bundles.bundle import Bundle, ModelSizes
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.generation.generate import drive
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Placement
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.inference.ending import (
    EncodingTime,
    Seen,
    is_hopeless,
    not_begun,
    refuse_if_all_raise,
    show,
)
from florence_onnx.inference.vision_encoders import VisionEncoders
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.engine import Engine

AnyImage = ImageInput | EncodedImage
Key = str | int
Answer = tuple[Seen, GeneratedSequence]
Failed = Callable[[Sequence[int], FlorenceError], None]
"""Takes the indices of the prompts about one image, and the error that concerns them."""
About = Mapping[Key, Sequence[Progress]]
"""What may end each answer about a distinct image, by the image's key."""
Outcome = tuple[Key, Seen | FlorenceError]
"""A distinct image's key, and the encoded image, or the loaded one if all answers about it have to end, or an error."""

BATCH_PIXELS = 8 * 64 * 64
"""Most pixels of the images that a CPU encodes in one run, measured with Florence-2-base (benchmarks/results/omniparser.md):
eight of 64 x 64 take three quarters of the time of single ones, more are slower again, and larger images gain nothing."""


class Answering(Protocol):
    """The three graphs of a model behind one interface: images and prompts in, tokens out."""

    @property
    def max_rows(self) -> int | None:
        """Most rows of a prompt in one step; None where there is no limit."""

    def check(self, config: SearchConfig) -> None:
        """Checks that the graphs can run a search.

        Raises:
            OptionsError: It feeds more tokens in one step than the graphs take.
        """

    def encode(self, image: PILImage.Image, preparation: Preparation) -> EncodedImage:
        """Runs the vision encoder on a loaded RGB image; the result refers to that image, without a copy."""

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on `pixel_values` `(1, 3, H, W)` of an image, at one of the bundle's image sizes."""

    def encode_all(
        self, images: Sequence[AnyImage], preparation: Preparation, failed: Failed
    ) -> dict[int, EncodedImage]:
        """Encodes images, each distinct one once, as many in one run as pays; encoded ones are returned as they are.

        Args:
            images: May occur several times.
            preparation: Of the images that are not encoded.
            failed: Called with an error that concerns one image only, and its indices; may raise.

        Returns:
            The encoded image of each index, without those that `failed` was told of.
        """

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
        preparation: Preparation,
        failed: Failed,
        progress: Sequence[Progress] | None = None,
    ) -> list[Answer | None]:
        """Answers P prompts, each about one image; an image that occurs several times is encoded once.

        Args:
            images: The image of each prompt. Those that are encoded may differ in their number of image tokens.
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens, 0 for padding.
            new_search: Makes a search for prompts by their indices; called again when decoding starts over.
            preparation: Of the images that are not encoded.
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

    def __init__(
        self, bundle: Bundle, encoders: VisionEncoders[Engine], text_model: TextBackend, *, can_batch: bool = False
    ) -> None:
        """Args:
        bundle: The model.
        encoders: Its vision encoders.
        text_model: Its text graphs.
        can_batch: Whether an image's features do not depend on the images beside it, and a batch may be faster.
        """
        self._bundle = bundle
        self._encoders = encoders
        self._text_model = text_model
        self._can_batch = can_batch
        self._encoding_time = EncodingTime()

    @property
    def max_rows(self) -> int | None:
        return None

    def check(self, config: SearchConfig) -> None:
        """Accepts every search: the graphs take any number of tokens."""

    def encode(self, image: PILImage.Image, preparation: Preparation) -> EncodedImage:
        return self._run([image], [preparation.pixel_values(image)], [preparation.placement(image)])[0]

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        return self._run([image], [pixel_values], [Placement(image.size, image.size)])[0]

    def _run(
        self, images: Sequence[PILImage.Image], pixel_values: Sequence[Floats], placements: Sequence[Placement]
    ) -> list[EncodedImage]:
        """Encodes images of one size in one run."""
        engine = self._encoders.get(placements[0].image_size)
        pixels = pixel_values[0] if len(pixel_values) == 1 else np.concatenate(pixel_values)
        found = self._encoding_time.of(placements[0].image_size, lambda: engine.run({"pixel_values": pixels}))
        features = np.asarray(found["image_features"], dtype=np.float32)
        # copied from a batch, which one of its images would keep in memory otherwise
        rows = [features[0]] if len(images) == 1 else [row.copy() for row in features]
        return [EncodedImage(*each) for each in zip(rows, images, placements, strict=True)]

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
        preparation: Preparation,
        failed: Failed,
        progress: Sequence[Progress] | None = None,
    ) -> list[Answer | None]:
        progress = progress or [Progress() for _ in images]
        answers: list[Answer | None] = [None] * len(images)
        encoded: dict[int, EncodedImage] = {}
        for row, image in self._see_all(images, preparation, failed, progress).items():
            if isinstance(image, EncodedImage) and progress[row].reason() is None:
                encoded[row] = image
            else:
                answers[row] = image, not_begun(new_search([row]), progress[row])
        # The graph takes as many image tokens of one prompt as of the others: images of other sizes are other batches.
        for rows in _rows_by_length(encoded):
            mask = attention_mask[rows]
            length = int(mask.sum(axis=1).max())
            image_features = np.stack([encoded[row].image_features for row in rows])
            session = self._text_model.start(input_ids[rows, :length], mask[:, :length], image_features)
            for row, sequence in zip(rows, drive(session, new_search(rows)), strict=True):
                answers[row] = encoded[row], sequence
        return answers

    def encode_all(
        self, images: Sequence[AnyImage], preparation: Preparation, failed: Failed
    ) -> dict[int, EncodedImage]:
        found = self._see_all(images, preparation, failed, [Progress() for _ in images])
        return {index: seen for index, seen in found.items() if isinstance(seen, EncodedImage)}

    def _see_all(
        self, images: Sequence[AnyImage], preparation: Preparation, failed: Failed, progress: Sequence[Progress]
    ) -> dict[int, Seen]:
        return see_distinct(
            images, progress, failed, lambda distinct, about: self._encode_each(distinct, preparation, about)
        )

    def _encode_each(self, images: Mapping[Key, AnyImage], preparation: Preparation, about: About) -> Iterator[Outcome]:
        width, height = preparation.image_size
        # An int8 encoder has one scale for the activations of a whole batch (DynamicQuantizeMatMul): an image's
        # features would depend on the images beside it.
        num_images = max(1, BATCH_PIXELS // (width * height)) if self._can_batch else 1
        batch: dict[Key, PILImage.Image] = {}
        for key, image in images.items():
            if isinstance(image, EncodedImage):
                yield key, checked(self._bundle, image)
                continue
            try:
                refuse_if_all_raise(about[key])
                batch[key] = load(image)
            except FlorenceError as error:
                yield key, error
            if len(batch) == num_images:
                yield from self._encode_batch(batch, preparation, about)
                batch = {}
        yield from self._encode_batch(batch, preparation, about)

    def _encode_batch(
        self, batch: Mapping[Key, PILImage.Image], preparation: Preparation, about: About
    ) -> Iterator[Outcome]:
        """Encodes images in one run or, where that fails, one by one, to find out whose error it is."""
        least = self._encoding_time.least(preparation.image_size)
        hopeless = {key for key in batch if is_hopeless(about[key], least)}
        yield from ((key, batch[key]) for key in hopeless)
        batch = {key: image for key, image in batch.items() if key not in hopeless}
        if not batch:
            return
        images = list(batch.values())
        try:
            pixels = [preparation.pixel_values(image) for image in images]
            found = self._run(images, pixels, [preparation.placement(image) for image in images])
        except FlorenceError as error:
            if len(batch) == 1:
                yield next(iter(batch)), error
                return
            for key, image in batch.items():
                yield from self._encode_batch({key: image}, preparation, about)
        else:
            yield from zip(batch, found, strict=True)


def _rows_by_length(encoded: Mapping[int, EncodedImage]) -> list[list[int]]:
    """The indices of prompts, in order, in lists of those whose images have equally many tokens."""
    by_length: dict[int, list[int]] = {}
    for row in sorted(encoded):
        by_length.setdefault(encoded[row].num_image_tokens, []).append(row)
    return list(by_length.values())


def see_distinct(
    images: Sequence[AnyImage],
    progress: Sequence[Progress],
    failed: Failed,
    encode: Callable[[Mapping[Key, AnyImage], About], Iterable[Outcome]],
) -> dict[int, Seen]:
    """Encodes each distinct image once, and shows it to those who follow the answers about it.

    Args:
        images: May occur several times.
        progress: What may end the answer about each image.
        failed: As for `Answering.encode_all`.
        encode: Encodes distinct images, unless all answers about one have to end.

    Returns:
        The image of each index, in order, without those that `failed` was told of.
    """
    indices = prompts_by_image(images)
    about = {key: [progress[index] for index in same] for key, same in indices.items()}
    seen: dict[int, Seen] = {}
    for key, found in encode({key: images[same[0]] for key, same in indices.items()}, about):
        if isinstance(found, FlorenceError):
            failed(indices[key], found)
        else:
            show(about[key], found)
            seen.update(dict.fromkeys(indices[key], found))
    return dict(sorted(seen.items()))


def checked(bundle: Bundle, image: EncodedImage) -> EncodedImage | FlorenceError:
    """An encoded image, or what `check_features` raises."""
    try:
        return check_features(bundle, image)
    except FlorenceError as error:
        return error


def raise_error(indices: Sequence[int], error: FlorenceError) -> None:
    """A `Failed` for calls that end with the first error."""
    raise error


def load(image: ImageInput) -> PILImage.Image:
    """Loads an image as RGB, and copies it where it would be the caller's own object, which may change later."""
    return decoding.load(image, copy=True)


def to_image(pixel_values: Floats, sizes: ModelSizes) -> PILImage.Image:
    """The image that `pixel_values` `(3, H, W)` show, at the size that they have."""
    scaled = pixel_values.transpose(1, 2, 0) * np.asarray(sizes.image_std) + np.asarray(sizes.image_mean)
    return PILImage.fromarray(np.clip(np.rint(scaled * 255), 0, 255).astype(np.uint8))


def check_features(bundle: Bundle, encoded: EncodedImage) -> EncodedImage:
    """Returns an encoded image whose features have the shape of this model's, at one of its image sizes.

    Raises:
        InputError: They have another shape, so another model has encoded the image.
    """
    shape = encoded.stored.shape
    known = [(count, bundle.sizes.width) for count in bundle.all_num_image_tokens]
    if shape not in known:
        raise InputError(
            f"this image was encoded by another model: its features are {shape}, here they are "
            f"{' or '.join(map(str, known))}; encode it again"
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
