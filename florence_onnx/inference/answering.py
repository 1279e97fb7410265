"""Pictures and prompts to tokens: through the host, or with everything between the graphs on a device."""

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

Picture = ImageInput | EncodedImage
Key = str | int


class Answering(Protocol):
    """What turns pictures and prompts into tokens."""

    def check(self, config: SearchConfig) -> None:
        """Raises OptionsError where a search asks for more than the graphs take."""

    def encode(self, picture: PILImage.Image) -> EncodedImage:
        """Runs the vision encoder on a loaded picture, which is kept as it is."""

    def answer(
        self,
        pictures: Sequence[Picture],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        """Encodes pictures, each once, and answers a prompt about each.

        Args:
            pictures: P, repeated where there are several prompts about one.
            input_ids: `(P, T)`, padded on the right.
            attention_mask: `(P, T)`, 1 for tokens.
            new_search: Makes the search of the prompts in some places; called again where an answer must begin anew.

        Raises:
            InputError: A picture cannot be read, or was encoded by another model.
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

    def encode(self, picture: PILImage.Image) -> EncodedImage:
        features = self._vision_encoder.run({"pixel_values": preprocess(self._sizes, picture)})["image_features"]
        return EncodedImage(np.asarray(features[0], dtype=np.float32), picture)

    def answer(
        self,
        pictures: Sequence[Picture],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        encoded = self._encode_all(pictures)
        image_features = np.stack([each.image_features for each in encoded])
        session = self._text_model.start(input_ids, attention_mask, image_features)
        return encoded, drive(session, new_search(range(len(pictures))))

    def _encode_all(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
        # One picture a call: on a CPU a batch is no faster, and what a picture gives must not depend on its neighbours.
        encoded: dict[Key, EncodedImage] = {}
        for picture in pictures:
            if key_of(picture) in encoded:
                continue
            if isinstance(picture, EncodedImage):
                encoded[key_of(picture)] = check(self._sizes, picture)
            else:
                encoded[key_of(picture)] = self.encode(load(picture))
        return [encoded[key_of(picture)] for picture in pictures]


def load(picture: ImageInput) -> PILImage.Image:
    """A picture that a caller cannot change afterwards."""
    loaded = decoding.load(picture)
    return loaded.copy() if loaded is picture else loaded


def preprocess(sizes: ModelSizes, picture: PILImage.Image) -> Floats:
    """Pixels `(1, 3, H, W)` as the vision encoder takes them."""
    return preprocessing.preprocess(picture, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)


def check(sizes: ModelSizes, encoded: EncodedImage) -> EncodedImage:
    """A picture that was encoded before, by this model or one like it.

    Raises:
        InputError: Its features have other sizes.
    """
    shape = encoded.stored.shape
    if shape != (sizes.num_image_tokens, sizes.width):
        raise InputError(
            f"this picture was encoded by another model: its features are {shape}, here they are "
            f"{(sizes.num_image_tokens, sizes.width)}; encode it again"
        )
    return encoded


def key_of(picture: Picture) -> Key:
    """What tells whether a picture occurs twice."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else id(picture)
