"""Pictures and prompts to tokens: through the host, or with everything between the graphs on a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
from PIL import Image as PILImage

from florence_onnx import image
from florence_onnx.bundle import ModelSizes
from florence_onnx.continuous_batching import Job
from florence_onnx.decoder import TextBackend
from florence_onnx.engine import Engine
from florence_onnx.errors import InputError
from florence_onnx.generation import drive
from florence_onnx.image import ImageInput
from florence_onnx.prediction import EncodedImage
from florence_onnx.resident_model import MAX_PICTURES, ResidentModel
from florence_onnx.search import Floats, GeneratedSequence, Ids, Search
from florence_onnx.workers import in_portions

Picture = ImageInput | EncodedImage
Key = str | int


class Answering(Protocol):
    """What turns pictures and prompts into tokens."""

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
            new_search: Makes the search of the prompts in some places.

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

    def encode(self, picture: PILImage.Image) -> EncodedImage:
        features = self._vision_encoder.run({"pixel_values": _preprocess(self._sizes, picture)})["image_features"]
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
            if _key(picture) in encoded:
                continue
            if isinstance(picture, EncodedImage):
                encoded[_key(picture)] = _check(self._sizes, picture)
            else:
                encoded[_key(picture)] = self.encode(_load(picture))
        return [encoded[_key(picture)] for picture in pictures]


class DeviceAnswering:
    """Features, keys and values stay on the device, and prompts of all callers are decoded together."""

    def __init__(self, sizes: ModelSizes, resident: ResidentModel) -> None:
        self._sizes = sizes
        self._resident = resident

    def encode(self, picture: PILImage.Image) -> EncodedImage:
        return EncodedImage(self._resident.encode([_preprocess(self._sizes, picture)])[0], picture)

    def answer(
        self,
        pictures: Sequence[Picture],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        places: dict[Key, list[int]] = {}
        for place, picture in enumerate(pictures):
            places.setdefault(_key(picture), []).append(place)
        encoded: dict[int, EncodedImage] = {}
        order: list[int] = []

        def jobs() -> Iterator[list[Job]]:
            for key, each in self._encode_all({key: pictures[found[0]] for key, found in places.items()}):
                features = self._resident.upload(each.stored)
                encoded.update(dict.fromkeys(places[key], each))
                order.extend(places[key])
                yield [
                    Job(input_ids[place, : attention_mask[place].sum()], features, new_search([place]))
                    for place in places[key]
                ]

        if len(places) == 1:  # nothing to encode while others are asked about, so no thread for it
            answers = self._resident.answer([job for portion in jobs() for job in portion])
        else:
            answers = self._resident.answer_all(jobs())
        by_place = dict(zip(order, answers, strict=True))
        everywhere = range(len(pictures))
        return [encoded[place] for place in everywhere], [by_place[place] for place in everywhere]

    def _encode_all(self, pictures: Mapping[Key, Picture]) -> Iterator[tuple[Key, EncodedImage]]:
        """Encodes in batches; the pictures of the next batch are decoded and scaled meanwhile, on all cores."""
        raw: list[tuple[Key, ImageInput]] = []
        for key, picture in pictures.items():
            if isinstance(picture, EncodedImage):
                yield key, _check(self._sizes, picture)
            else:
                raw.append((key, picture))

        def prepare(pair: tuple[Key, ImageInput]) -> tuple[Key, PILImage.Image, Floats]:
            loaded = _load(pair[1])
            return pair[0], loaded, _preprocess(self._sizes, loaded)

        for portion in in_portions(prepare, raw, MAX_PICTURES):
            features = self._resident.encode([pixels for *_, pixels in portion])
            for (key, loaded, _), stored in zip(portion, features, strict=True):
                yield key, EncodedImage(stored, loaded)


def _load(picture: ImageInput) -> PILImage.Image:
    """A picture that a caller cannot change afterwards."""
    loaded = image.load(picture)
    return loaded.copy() if loaded is picture else loaded


def _preprocess(sizes: ModelSizes, picture: PILImage.Image) -> Floats:
    return image.preprocess(picture, size=sizes.image_size, mean=sizes.image_mean, std=sizes.image_std)


def _check(sizes: ModelSizes, encoded: EncodedImage) -> EncodedImage:
    shape = encoded.stored.shape
    if shape != (sizes.num_image_tokens, sizes.width):
        raise InputError(
            f"this picture was encoded by another model: its features are {shape}, here they are "
            f"{(sizes.num_image_tokens, sizes.width)}; encode it again"
        )
    return encoded


def _key(picture: Picture) -> Key:
    """What tells whether a picture occurs twice."""
    return os.fspath(picture) if isinstance(picture, str | os.PathLike) else id(picture)
