"""The stages with everything on the device: images in, features that stay there, answers out."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from florence_onnx.errors import DeviceMemoryError, ProviderError
from florence_onnx.generation.search import GeneratedSequence
from florence_onnx.inference.continuous_batching import ContinuousBatch, Job
from florence_onnx.inference.decoder_call import ResidentSizes, padded_count
from florence_onnx.inference.resident_decoder import ResidentDecoder
from florence_onnx.runtime.cuda_memory import CudaMemory
from florence_onnx.runtime.device_memory import DeviceArray, DeviceMemory
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine

Floats = npt.NDArray[np.float32]

_log = logging.getLogger("florence_onnx")


class ResidentVision:
    """The vision encoder, from pixels on the host to features on the device. For the thread that has the device."""

    def __init__(self, engine: OnnxEngine, sizes: ResidentSizes) -> None:
        """Args:
        engine: `vision_encoder.onnx`.
        sizes: Of the model.
        """
        self._engine = engine
        self._sizes = sizes
        self._batches: dict[int, _VisionBatch] = {}

    def encode(self, pixel_values: Sequence[Floats]) -> list[DeviceArray]:
        """Encodes up to `MAX_IMAGES` images in one run; in several where the memory does not suffice for one.

        Args:
            pixel_values: `(1, 3, H, W)` each.

        Returns:
            Features `(N, D)` float32 of each.

        Raises:
            DeviceMemoryError: There is not enough memory for a single image.
            ProviderError: The provider failed.
        """
        count = padded_count(len(pixel_values))
        try:
            batch = self._batches.get(count)
            if batch is None:
                batch = self._batches[count] = _VisionBatch(self._engine, self._sizes, count, pixel_values[0].shape[1:])
            return batch.run(pixel_values)
        except DeviceMemoryError as error:
            self._batches.pop(count, None)
            if len(pixel_values) == 1:
                raise
            _log.warning("%d images at a time do not fit: %s", len(pixel_values), error)
        half = count // 2
        return self.encode(pixel_values[:half]) + self.encode(pixel_values[half:])


class _VisionBatch:
    """Buffers and binding for so many images."""

    def __init__(self, engine: OnnxEngine, sizes: ResidentSizes, count: int, image: tuple[int, ...]) -> None:
        memory = engine.memory
        self._memory = memory
        self._staging: Floats = np.zeros((count, *image), dtype=np.float32)
        _pin(memory, self._staging)
        self._pixels = memory.allocate(self._staging.shape, np.float32)
        self._features = memory.allocate((count, sizes.num_image_tokens, sizes.width), np.float32)
        self._binding: OnnxBinding = engine.bind()
        self._binding.bind_input("pixel_values", self._pixels)
        self._binding.bind_output("image_features", self._features)
        self._binding.capture()

    def run(self, pixel_values: Sequence[Floats]) -> list[DeviceArray]:
        """Args: pixel_values, as many as the batch is for or fewer."""
        for place, pixels in enumerate(pixel_values):
            self._staging[place] = pixels[0]
        self._pixels.upload(self._staging)
        self._binding.run()
        found = []
        for place in range(len(pixel_values)):
            features = self._memory.allocate(self._features.shape[1:], np.float32)
            self._memory.copy(self._features[place : place + 1], features)
            found.append(features)
        return found


def _pin(memory: DeviceMemory, array: Floats) -> None:
    """Lets a card read a host array by itself; where that is refused, copies are slower."""
    if isinstance(memory, CudaMemory):
        try:
            memory.pin(array)
        except ProviderError as error:
            _log.info("images are copied to the device from memory that is not pinned: %s", error)


class ResidentModel:
    """Vision and text on one device, for many threads."""

    def __init__(
        self,
        engines: tuple[OnnxEngine, OnnxEngine, OnnxEngine],
        sizes: ResidentSizes,
        max_batch: int,
        max_tokens: int | None = None,
    ) -> None:
        """Args:
        engines: `vision_encoder.onnx`, `text_encoder.onnx`, `decoder_top.onnx`.
        sizes: Of the model.
        max_batch: Most prompts decoded together.
        max_tokens: Most tokens of a prompt that the decoder takes at a time; None for any number.
        """
        self.max_tokens = max_tokens
        vision_encoder, text_encoder, decoder = engines
        self.max_batch = max_batch
        self._memory = vision_encoder.memory
        self._vision = ResidentVision(vision_encoder, sizes)
        self._batch = ContinuousBatch(ResidentDecoder(text_encoder, decoder, sizes), max_batch)
        weakref.finalize(self, self._batch.close)

    def encode(self, pixel_values: Sequence[Floats]) -> list[DeviceArray]:
        """As `ResidentVision.encode`."""
        return self._batch.call(lambda: self._vision.encode(pixel_values))

    def upload(self, image_features: Floats | DeviceArray) -> DeviceArray:
        """Features on this device, copied there if they are elsewhere.

        Args:
            image_features: `(N, D)`.
        """
        if isinstance(image_features, DeviceArray):
            if image_features.memory.is_same(self._memory):
                return image_features
            image_features = image_features.download()
        features = self._memory.allocate(image_features.shape, np.float32)
        features.upload(np.asarray(image_features, dtype=np.float32))
        return features

    def answer(self, jobs: Sequence[Job]) -> list[GeneratedSequence]:
        """Answers prompts, beside those of other threads.

        Raises:
            FlorenceError: The device failed, or its memory is full.
        """
        for job in jobs:
            self._batch.submit(job)
        try:
            self._batch.wait(lambda: _all_done(jobs))
            return [job.result() for job in jobs]
        finally:
            self._batch.discard(jobs)

    def answer_all(self, arriving: Iterable[Sequence[Job]]) -> list[GeneratedSequence]:
        """Answers prompts while more of them are made: images are encoded while others are asked about.

        Args:
            arriving: Jobs in portions; iterated over in a thread of its own.

        Returns:
            Answers in the order of the jobs.

        Raises:
            FlorenceError: As `answer`; or whatever iterating raised.
        """
        from concurrent.futures import ThreadPoolExecutor

        jobs: list[Job] = []
        is_over = threading.Event()
        try:
            with ThreadPoolExecutor(1) as feeder:
                fed = feeder.submit(self._feed, arriving, jobs, is_over)
                fed.add_done_callback(lambda _: self._batch.notify())
                try:
                    self._batch.wait(lambda: fed.done() and (fed.exception() is not None or _all_done(jobs)))
                finally:
                    is_over.set()
                fed.result()
            return [job.result() for job in jobs]
        finally:
            self._batch.discard(jobs)  # when nothing is submitted any more

    def _feed(self, arriving: Iterable[Sequence[Job]], jobs: list[Job], is_over: threading.Event) -> None:
        for portion in arriving:
            if is_over.is_set():
                return
            for job in portion:
                jobs.append(job)
                self._batch.submit(job)


def _all_done(jobs: Sequence[Job]) -> bool:
    return all(job.is_done for job in jobs)
