"""Images and prompts to tokens on a device: features and KV caches stay there, between the graphs and between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial

from PIL import Image as PILImage

from florence_onnx.bundles.bundle import Bundle
from florence_onnx.bundles.memory import MAX_IMAGES
from florence_onnx.errors import FlorenceError, OptionsError
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.progress import Progress
from florence_onnx.generation.search import Floats, Ids, Search
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Placement
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import (
    About,
    Answer,
    AnyImage,
    Failed,
    Key,
    Outcome,
    checked,
    image_key,
    load,
    prompts_by_image,
    see_distinct,
)
from florence_onnx.inference.continuous_batching import DecodeRequest
from florence_onnx.inference.ending import EncodingTime, Seen, is_hopeless, not_begun, refuse_if_all_raise, show
from florence_onnx.inference.resident_model import ResidentModel
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.runtime.workers import map_in_batches

_Prepared = tuple[PILImage.Image, Floats]
"""An image, RGB, and its `pixel_values` `(1, 3, H, W)`."""


class DeviceAnswering:
    """Images are encoded in batches, and the prompts of all callers are decoded in one continuous batch."""

    def __init__(self, bundle: Bundle, resident: ResidentModel) -> None:
        self._bundle = bundle
        self._resident = resident
        self._encoding_time = EncodingTime()

    @property
    def max_rows(self) -> int | None:
        return self._resident.max_tokens

    def check(self, config: SearchConfig) -> None:
        is_greedy = config.num_beams == 1 and not config.do_sample
        rows = max(config.num_beams, config.num_return_sequences)
        needed = 1 + config.prompt_lookup_num_tokens if is_greedy else rows
        most = self._resident.max_tokens
        if most is not None and needed > most:
            rows_by = "num_beams" if config.num_beams > 1 else "num_return_sequences"
            option = "prompt_lookup_num_tokens" if is_greedy else rows_by
            raise OptionsError(
                f"{option} is too large for the TensorRT engines, which take {most} tokens of a prompt at a time, and this needs "
                f'{needed}; device="cuda" has no such limit'
            )

    def encode(self, image: PILImage.Image, preparation: Preparation) -> EncodedImage:
        pixels = [preparation.pixel_values(image)]
        features = self._encoding_time.of(preparation.image_size, lambda: self._resident.encode(pixels))[0]
        return EncodedImage(features, image, preparation.placement(image))

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        return EncodedImage(self._resident.encode([pixel_values])[0], image, Placement(image.size, image.size))

    def encode_all(
        self, images: Sequence[AnyImage], preparation: Preparation, failed: Failed
    ) -> dict[int, EncodedImage]:
        found = see_distinct(
            images,
            [Progress() for _ in images],
            failed,
            lambda distinct, about: self._encode_each(distinct, preparation, about),
        )
        return {index: seen for index, seen in found.items() if isinstance(seen, EncodedImage)}

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
        indices = prompts_by_image(images)
        distinct = {key: images[same[0]] for key, same in indices.items()}
        about = {key: [progress[index] for index in same] for key, same in indices.items()}
        seen: dict[Key, Seen] = {}
        answers: list[Answer | None] = [None] * len(images)
        order: list[int] = []  # index of the prompt of each request: an image that is encoded already comes first

        def request(index: int, features: DeviceArray) -> DecodeRequest:
            prompt_ids = input_ids[index, : attention_mask[index].sum()]
            return DecodeRequest(prompt_ids, features, lambda: new_search([index]), progress[index])

        def requests() -> Iterator[list[DecodeRequest]]:
            for key, each in self._encode_each(distinct, preparation, about):
                if isinstance(each, FlorenceError):
                    failed(indices[key], each)
                    continue
                seen[key] = each
                show(about[key], each)
                if not isinstance(each, EncodedImage):
                    for index in indices[key]:
                        answers[index] = each, not_begun(new_search([index]), progress[index])
                    continue
                order.extend(indices[key])
                features = self._resident.upload(each.stored)
                yield [request(index, features) for index in indices[key]]

        if len(indices) == 1:  # no encoding that decoding could overlap with, so no thread for it
            sequences = self._resident.answer([each for some in requests() for each in some])
        else:
            sequences = self._resident.answer_stream(requests())
        for index, sequence in zip(order, sequences, strict=True):
            if isinstance(sequence, FlorenceError):
                failed([index], sequence)
            else:
                answers[index] = seen[image_key(images[index])], sequence
        return answers

    def _encode_each(self, images: Mapping[Key, AnyImage], preparation: Preparation, about: About) -> Iterator[Outcome]:
        """Encodes in batches, except images whose answers have to end.

        Meanwhile the images of the next batch are decoded and preprocessed on all cores.
        """
        raw: list[tuple[Key, ImageInput]] = []
        for key, image in images.items():
            if isinstance(image, EncodedImage):
                yield key, checked(self._bundle, image)
            else:
                raw.append((key, image))

        for batch in map_in_batches(partial(self._prepare, preparation, about), raw, MAX_IMAGES):
            yield from self._encode_batch(batch, preparation, about)

    def _prepare(
        self, preparation: Preparation, about: About, pair: tuple[Key, ImageInput]
    ) -> tuple[Key, _Prepared | FlorenceError]:
        try:
            refuse_if_all_raise(about[pair[0]])
            loaded = load(pair[1])
            return pair[0], (loaded, preparation.pixel_values(loaded))
        except FlorenceError as error:
            return pair[0], error

    def _encode_batch(
        self, batch: Sequence[tuple[Key, _Prepared | FlorenceError]], preparation: Preparation, about: About
    ) -> Iterator[Outcome]:
        prepared: list[tuple[Key, _Prepared]] = []
        for key, each in batch:
            if isinstance(each, FlorenceError):
                yield key, each
            elif is_hopeless(about[key], self._encoding_time.least(preparation.image_size)):
                yield key, each[0]
            else:
                prepared.append((key, each))
        if not prepared:
            return
        try:
            features = self._encoding_time.of(
                preparation.image_size,
                lambda: self._resident.encode([pixel_values for _, (_, pixel_values) in prepared]),
            )
        except FlorenceError as error:  # of the whole run: each image gets a copy, which is given its place
            yield from ((key, copy(error)) for key, _ in prepared)
            return
        for (key, (loaded, _)), stored in zip(prepared, features, strict=True):
            yield key, EncodedImage(stored, loaded, preparation.placement(loaded))
