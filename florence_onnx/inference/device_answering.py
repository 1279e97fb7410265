"""Images and prompts to tokens on a device: features and KV caches stay there, between the graphs and between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from PIL import Image as PILImage

from florence_onnx.bundles.bundle import Bundle
from florence_onnx.bundles.memory import MAX_IMAGES
from florence_onnx.errors import OptionsError
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search
from florence_onnx.images.decoding import ImageInput
from florence_onnx.images.placement import Placement
from florence_onnx.images.preprocessing import Preparation
from florence_onnx.inference.answering import AnyImage, Key, image_key, load, prompts_by_image, split_encoded
from florence_onnx.inference.continuous_batching import DecodeRequest
from florence_onnx.inference.resident_model import ResidentModel
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.runtime.workers import map_in_batches


class DeviceAnswering:
    """Images are encoded in batches, and the prompts of all callers are decoded in one continuous batch."""

    def __init__(self, bundle: Bundle, resident: ResidentModel) -> None:
        self._bundle = bundle
        self._resident = resident

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
        features = self._resident.encode([preparation.pixel_values(image)])[0]
        return EncodedImage(features, image, preparation.placement(image))

    def encode_pixels(self, pixel_values: Floats, image: PILImage.Image) -> EncodedImage:
        return EncodedImage(self._resident.encode([pixel_values])[0], image, Placement(image.size, image.size))

    def encode_all(self, images: Sequence[AnyImage], preparation: Preparation) -> list[EncodedImage]:
        encoded = dict(self._encode_all(images, preparation))
        return [encoded[image_key(image)] for image in images]

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
        preparation: Preparation,
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        indices = prompts_by_image(images)
        encoded: dict[Key, EncodedImage] = {}
        order: list[int] = []  # index of the prompt of each request: an image that is encoded already comes first

        def request(index: int, features: DeviceArray) -> DecodeRequest:
            prompt_ids = input_ids[index, : attention_mask[index].sum()]
            return DecodeRequest(prompt_ids, features, lambda: new_search([index]))

        def requests() -> Iterator[list[DecodeRequest]]:
            for key, each in self._encode_all(images, preparation):
                encoded[key] = each
                order.extend(indices[key])
                features = self._resident.upload(each.stored)
                yield [request(index, features) for index in indices[key]]

        if len(indices) == 1:  # no encoding that decoding could overlap with, so no thread for it
            answers = self._resident.answer([each for some in requests() for each in some])
        else:
            answers = self._resident.answer_stream(requests())
        by_index = dict(zip(order, answers, strict=True))
        return [encoded[image_key(image)] for image in images], [by_index[index] for index in range(len(images))]

    def _encode_all(self, images: Sequence[AnyImage], preparation: Preparation) -> Iterator[tuple[Key, EncodedImage]]:
        """Encodes in batches; meanwhile the images of the next batch are decoded and preprocessed on all cores."""
        encoded, raw = split_encoded(self._bundle, images)
        yield from encoded.items()

        def prepare(pair: tuple[Key, ImageInput]) -> tuple[Key, PILImage.Image, Floats]:
            loaded = load(pair[1])
            return pair[0], loaded, preparation.pixel_values(loaded)

        for batch in map_in_batches(prepare, list(raw.items()), MAX_IMAGES):
            features = self._resident.encode([pixel_values for *_, pixel_values in batch])
            for (key, loaded, _), stored in zip(batch, features, strict=True):
                yield key, EncodedImage(stored, loaded, preparation.placement(loaded))
