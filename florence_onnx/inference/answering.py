"""Images and prompts to tokens: through the host, or with everything between the graphs on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from PIL import Image as PILImage

from florence_onnx.bundles.bundle import ModelSizes
from florence_onnx.errors import InputError
from florence_onnx.generation.generate import drive
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search
from florence_onnx.images import decoding, preprocessing
from florence_onnx.images.decoding import ImageInput
from florence_onnx.inference.decoder import TextBackend
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.engine import Engine

AnyImage = ImageInput | EncodedImage
Key = str | int


class Answering(Protocol):
    """What turns images and prompts into tokens."""

    def check(self, config: SearchConfig) -> None:
        """Raises OptionsError where a search asks for more than the graphs take."""

    def encode(self, image: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on a loaded image, which is kept as it is."""

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on `pixel_values` `(1, 3, H, W)` of an image."""

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        """Encodes images, each once, and answers a prompt about each.

        Args:
            images: P, repeated where there are several prompts about one.
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens.
            new_search: Makes the search of the prompts in some places; called again where an answer must begin anew.

        Raises:
            InputError: An image cannot be read, or was encoded by another model.
            ProviderError: The device failed.
        """


class HostAnswering:
    """Every graph takes from and gives to the host; a batch is decoded by itself."""

    def __init__(self, sizes: ModelSizes, vision_encoder: Engine, text_model: TextBackend) -> None:
        self._sizes = sizes
        self._vision_encoder = vision_encoder
        self._text_model = text_model

    def check(self, config: SearchConfig) -> None:
        """All searches are possible."""

    def encode(self, image: PILImage.Image) -> EncodedImage:
        return self.encode_pixels(preprocess(self._sizes, image), image)

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        features = self._vision_encoder.run({"pixel_values": pixel_values})["image_features"]
        return EncodedImage(np.asarray(features[0], dtype=np.float32), image)

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        encoded = self._encode_all(images)
        image_features = np.stack([each.image_features for each in encoded])
        session = self._text_model.start(input_ids, attention_mask, image_features)
        return encoded, drive(session, new_search(range(len(images))))

    def _encode_all(self, images: Sequence[AnyImage]) -> list[EncodedImage]:
        # One image a call: on a CPU a batch is no faster, and what an image gives must not depend on its neighbours.
        encoded: dict[Key, EncodedImage] = {}
        for image in images:
            if key_of(image) in encoded:
                continue
            if isinstance(image, EncodedImage):
                encoded[key_of(image)] = check(self._sizes, image)
            else:
                encoded[key_of(image)] = self.encode(load(image))
        return [encoded[key_of(image)] for image in images]


def load(image: ImageInput) -> PILImage.Image:
    """An image that a caller cannot change afterwards."""
    return decoding.load(image, copy=True)


def preprocess(sizes: ModelSizes, image: PILImage.Image) -> Floats:
    """Pixels `(1, 3, H, W)` as the vision encoder takes them."""
    return preprocessing.preprocess(image, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)


def to_image(pixel_values: Floats, sizes: ModelSizes) -> PILImage.Image:
    """The image that `pixel_values` `(3, H, W)` show: the inverse of `preprocess`, but for the size."""
    scaled = pixel_values.transpose(1, 2, 0) * np.asarray(sizes.image_std) + np.asarray(sizes.image_mean)
    return PILImage.fromarray(np.clip(np.rint(scaled * 255), 0, 255).astype(np.uint8))


def check(sizes: ModelSizes, encoded: EncodedImage) -> EncodedImage:
    """An image that was encoded before, by this model or one like it.

    Raises:
        InputError: Its features have other sizes.
    """
    shape = encoded.stored.shape
    if shape != (sizes.num_image_tokens, sizes.width):
        raise InputError(
            f"this image was encoded by another model: its features are {shape}, here they are "
            f"{(sizes.num_image_tokens, sizes.width)}; encode it again"
        )
    return encoded


def key_of(image: AnyImage) -> Key:
    """What tells whether an image occurs twice."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else id(image)
