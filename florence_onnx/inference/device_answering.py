"""Images and prompts to tokens with everything between the graphs on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from PIL import Image as PILImage

from florence_onnx.bundles.bundle import ModelSizes
from florence_onnx.bundles.memory import MAX_IMAGES
from florence_onnx.errors import OptionsError
from florence_onnx.generation.options import SearchConfig
from florence_onnx.generation.search import Floats, GeneratedSequence, Ids, Search
from florence_onnx.images.decoding import ImageInput
from florence_onnx.inference.answering import AnyImage, Key, check, key_of, load, preprocess
from florence_onnx.inference.continuous_batching import Job
from florence_onnx.inference.resident_model import ResidentModel
from florence_onnx.prediction import EncodedImage
from florence_onnx.runtime.device_memory import DeviceArray
from florence_onnx.runtime.workers import in_portions


class DeviceAnswering:
    """Features, keys and values stay on the device, and prompts of all callers are decoded together."""

    def __init__(self, sizes: ModelSizes, resident: ResidentModel) -> None:
        self._sizes = sizes
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

    def encode(self, image: PILImage.Image) -> EncodedImage:
        return EncodedImage(self._resident.encode([preprocess(self._sizes, image)])[0], image)

    def answer(
        self,
        images: Sequence[AnyImage],
        input_ids: Ids,
        attention_mask: Ids,
        new_search: Callable[[Sequence[int]], Search],
    ) -> tuple[list[EncodedImage], list[GeneratedSequence]]:
        places: dict[Key, list[int]] = {}
        for place, image in enumerate(images):
            places.setdefault(key_of(image), []).append(place)
        encoded: dict[int, EncodedImage] = {}
        order: list[int] = []

        def job(place: int, features: DeviceArray) -> Job:
            return Job(input_ids[place, : attention_mask[place].sum()], features, lambda: new_search([place]))

        def jobs() -> Iterator[list[Job]]:
            for key, each in self._encode_all({key: images[found[0]] for key, found in places.items()}):
                features = self._resident.upload(each.stored)
                encoded.update(dict.fromkeys(places[key], each))
                order.extend(places[key])
                yield [job(place, features) for place in places[key]]

        if len(places) == 1:  # nothing to encode while others are asked about, so no thread for it
            answers = self._resident.answer([each for portion in jobs() for each in portion])
        else:
            answers = self._resident.answer_all(jobs())
        by_place = dict(zip(order, answers, strict=True))
        everywhere = range(len(images))
        return [encoded[place] for place in everywhere], [by_place[place] for place in everywhere]

    def _encode_all(self, images: Mapping[Key, AnyImage]) -> Iterator[tuple[Key, EncodedImage]]:
        """Encodes in batches; the images of the next batch are decoded and scaled meanwhile, on all cores."""
        raw: list[tuple[Key, ImageInput]] = []
        for key, image in images.items():
            if isinstance(image, EncodedImage):
                yield key, check(self._sizes, image)
            else:
                raw.append((key, image))

        def prepare(pair: tuple[Key, ImageInput]) -> tuple[Key, PILImage.Image, Floats]:
            loaded = load(pair[1])
            return pair[0], loaded, preprocess(self._sizes, loaded)

        for portion in in_portions(prepare, raw, MAX_IMAGES):
            features = self._resident.encode([pixels for *_, pixels in portion])
            for (key, loaded, _), stored in zip(portion, features, strict=True):
                yield key, EncodedImage(stored, loaded)
