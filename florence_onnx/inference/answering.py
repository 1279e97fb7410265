"""Images and prompts to tokens: the interface for host and device, what both share, and the way through the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image as PILImage

from florence_onnx.bundles.bundle import Bundle, ModelSizes
from florence_onnx.errors import InputError
from florence_onnx.generation.generate import drive
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search
from florence_onnx.images import decoding
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Placement
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.inference.vision_encoders import VisionEncoders
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.engine import Engine

AnyImage = ImageInput | EncodedImage
Key = str | int

BATCH_PIXELS = 8 * 64 * 64
"""Most pixels of the images that a CPU encodes in one run, measured with Florence-2-base (benchmarks/results/omniparser.md):
eight of 64 x 64 take three quarters of the time of single ones, more are slower again, and larger images gain nothing."""


class Answering(Protocol):
    """The three graphs of a model behind one interface: images and prompts in, tokens out."""

    def check(self, config: SearchConfig) -> None:
        """Checks that the graphs can run a search.

        Raises:
            OptionsError: It feeds more tokens in one step than the graphs take.
        """

    def encode(self, image: PILImage.Image, preparation: Preparation) -> EncodedImage:
        """Runs the vision encoder on a loaded RGB image; the result refers to that image, without a copy."""

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on `pixel_values` `(1, 3, H, W)` of an image, at one of the bundle's image sizes."""

    def encode_all(self, images: Sequence[AnyImage], preparation: Preparation) -> list[EncodedImage]:
        """Encodes images, each distinct one once, as many in one run as pays; encoded ones are returned as they are.

        Raises:
            InputError: An image cannot be read, or was encoded by another model.
            ProviderError: The device failed.
        """

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
        preparation: Preparation,
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        """Answers P prompts, each about one image; an image that occurs several times is encoded once.

        Args:
            images: The image of each prompt. Those that are encoded may differ in their number of image tokens.
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens, 0 for padding.
            new_search: Makes a search for prompts by their indices; called again when decoding starts over.
            preparation: Of the images that are not encoded.

        Returns:
            The encoded image and the tokens of each prompt.

        Raises:
            InputError: An image cannot be read, or was encoded by another model.
            ProviderError: The device failed.
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
        features = np.asarray(engine.run({"pixel_values": pixels})["image_features"], dtype=np.float32)
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
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        encoded = self.encode_all(images, preparation)
        by_length: dict[int, list[int]] = {}
        for index, each in enumerate(encoded):
            by_length.setdefault(each.num_image_tokens, []).append(index)
        found: dict[int, GeneratedSequence] = {}
        # The graph takes as many image tokens of one prompt as of the others: images of other sizes are other batches.
        for indices in by_length.values():
            features = np.stack([encoded[index].image_features for index in indices])
            length = int(attention_mask[indices].sum(axis=1).max()) if len(by_length) > 1 else input_ids.shape[1]
            session = self._text_model.start(input_ids[indices, :length], attention_mask[indices, :length], features)
            found.update(zip(indices, drive(session, new_search(indices)), strict=True))
        return encoded, [found[index] for index in range(len(images))]

    def encode_all(self, images: Sequence[AnyImage], preparation: Preparation) -> list[EncodedImage]:
        encoded, raw = split_encoded(self._bundle, images)
        width, height = preparation.image_size
        # An int8 encoder has one scale for the activations of a whole batch (DynamicQuantizeMatMul): an image's
        # features would depend on the images beside it.
        num_images = max(1, BATCH_PIXELS // (width * height)) if self._can_batch else 1
        for batch in _batches(raw, num_images):
            loaded = [load(image) for _, image in batch]
            pixels = [preparation.pixel_values(image) for image in loaded]
            found = self._run(loaded, pixels, [preparation.placement(image) for image in loaded])
            encoded.update(zip((key for key, _ in batch), found, strict=True))
        return [encoded[image_key(image)] for image in images]


def _batches(items: Mapping[Key, ImageInput], size: int) -> Iterator[list[tuple[Key, ImageInput]]]:
    pairs = list(items.items())
    return (pairs[first : first + size] for first in range(0, len(pairs), size))


def split_encoded(bundle: Bundle, images: Sequence[AnyImage]) -> tuple[dict[Key, EncodedImage], dict[Key, ImageInput]]:
    """Distinct images by `image_key`: those that are encoded, and the others, in the order of first occurrence.

    Raises:
        InputError: An image was encoded by another model.
    """
    encoded: dict[Key, EncodedImage] = {}
    raw: dict[Key, ImageInput] = {}
    for image in images:
        if isinstance(image, EncodedImage):
            encoded[image_key(image)] = check_features(bundle, image)
        else:
            raw.setdefault(image_key(image), image)
    return encoded, raw


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
