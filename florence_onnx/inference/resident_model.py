"""The three graphs on one device: pixel values in, token ids out; features and KV caches stay in device memory."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from florence_onnx import forks
from florence_onnx.errors import DeviceMemoryError, FlorenceError, ProviderError
from florence_onnx.generation.search import GeneratedSequence
from florence_onnx.inference.continuous_batching import ContinuousBatch, DecodeRequest
from florence_onnx.inference.decoder_call import ResidentSizes, padded_count
from florence_onnx.inference.resident_decoder import ResidentDecoder
from florence_onnx.inference.vision_encoders import VisionEncoders
from florence_onnx.runtime.cuda_memory import CudaMemory
from florence_onnx.runtime.device_memory import DeviceArray, DeviceMemory
from florence_onnx.runtime.engine import OnnxBinding, OnnxEngine

Floats = npt.NDArray[np.float32]

_log = logging.getLogger("florence_onnx")


class ResidentVision:
    """The vision encoder, from pixel values on the host to features on the device. For the device thread only."""

    def __init__(self, encoders: VisionEncoders[OnnxEngine], sizes: ResidentSizes) -> None:
        """Args:
        encoders: The vision encoders of the model's image sizes.
        sizes: Of the model.
        """
        self._encoders = encoders
        self._sizes = sizes
        self._batches: dict[tuple[int, ...], _VisionBatch] = {}

    def encode(self, pixel_values: Sequence[Floats]) -> list[DeviceArray]:
        """Encodes a batch of images in one run, or by halves where memory does not hold the batch.

        In int8 the activations of a run share one scale, so that features may depend on the other images of the batch.

        Args:
            pixel_values: At most `bundles.memory.MAX_IMAGES`, each `(1, 3, H, W)` float32, all of one size.

        Returns:
            Features of each image, `(N, D)` float32.

        Raises:
            DeviceMemoryError: There is not enough memory for a single image.
            ProviderError: The provider failed.
        """
        count = padded_count(len(pixel_values))
        key = count, *pixel_values[0].shape[1:]
        try:
            batch = self._batches.get(key)
            if batch is None:
                batch = self._batches[key] = self._new_batch(*key)
            return batch.run(pixel_values)
        except DeviceMemoryError as error:
            self._batches.pop(key, None)
            if len(pixel_values) == 1:
                raise
            _log.warning("a batch of %d images does not fit, trying halves: %s", len(pixel_values), error)
        half = count // 2
        return self.encode(pixel_values[:half]) + self.encode(pixel_values[half:])

    def _new_batch(self, count: int, channels: int, height: int, width: int) -> _VisionBatch:
        engine = self._encoders.get((width, height))
        features = (count, self._encoders.num_image_tokens((width, height)), self._sizes.width)
        return _VisionBatch(engine, features, (count, channels, height, width))


class _VisionBatch:
    """Buffers and binding of the vision encoder for one batch size."""

    def __init__(self, engine: OnnxEngine, features: tuple[int, ...], pixels: tuple[int, ...]) -> None:
        """Args:
        engine: The vision encoder for the size of the images.
        features: `(B, N, D)` for the B images of a run.
        pixels: `(B, 3, H, W)`.
        """
        memory = engine.memory
        self._memory = memory
        self._staging: Floats = np.zeros(pixels, dtype=np.float32)
        _pin(memory, self._staging)
        self._pixels = memory.allocate(self._staging.shape, np.float32)
        self._features = memory.allocate(features, np.float32)
        self._binding: OnnxBinding = engine.bind()
        self._binding.bind_input("pixel_values", self._pixels)
        self._binding.bind_output("image_features", self._features)
        self._binding.capture()

    def run(self, pixel_values: Sequence[Floats]) -> list[DeviceArray]:
        """Encodes at most B images, each `(1, 3, H, W)`; the rest of the batch is left from earlier runs."""
        for at, pixels in enumerate(pixel_values):
            self._staging[at] = pixels[0]
        self._pixels.upload(self._staging)
        self._binding.run()
        found = []
        for at in range(len(pixel_values)):  # copied: the next run overwrites the output, and callers keep features
            features = self._memory.allocate(self._features.shape[1:], np.float32)
            self._memory.copy(self._features[at : at + 1], features)
            found.append(features)
        return found


def _pin(memory: DeviceMemory, array: Floats) -> None:
    """Pins a host array on CUDA, for faster copies; where CUDA refuses, it stays pageable."""
    if isinstance(memory, CudaMemory):
        try:
            memory.pin(array)
        except ProviderError as error:
            _log.info("images are copied to the device from pageable memory, which is slower: %s", error)


class _Started(NamedTuple):
    """What a process makes of its own to run the graphs."""

    vision: ResidentVision
    batch: ContinuousBatch
    finalizer: weakref.finalize[..., ResidentModel]


class ResidentModel:
    """The three graphs on one device, for callers in many threads."""

    def __init__(
        self,
        encoders: VisionEncoders[OnnxEngine],
        text: tuple[OnnxEngine, OnnxEngine],
        sizes: ResidentSizes,
        max_batch: int,
        max_tokens: int | None = None,
    ) -> None:
        """Args:
        encoders: The vision encoders of the model's image sizes.
        text: `text_encoder.onnx`, `decoder_top.onnx`.
        sizes: Of the model.
        max_batch: Most prompts in flight.
        max_tokens: Most tokens of a prompt that a decode step takes, over all its beams; None for any number.
        """
        self.max_tokens = max_tokens
        self.max_batch = max_batch
        self._encoders = encoders
        self._text = text
        self._sizes = sizes
        self._memory = encoders.default.memory
        self._lock = forks.Lock()
        self._started: _Started | None = self._start()
        forks.call_in_child(self._forget_in_child)

    def _start(self) -> _Started:
        batch = ContinuousBatch(ResidentDecoder(*self._text, self._sizes), self.max_batch)
        return _Started(ResidentVision(self._encoders, self._sizes), batch, weakref.finalize(self, batch.close))

    def _running(self) -> _Started:
        """The buffers and the device thread; new ones at the first call in a forked child, which has no such thread."""
        with self._lock:
            if self._started is None:
                self._started = self._start()
            return self._started

    def _forget_in_child(self) -> None:
        if self._started is not None:
            self._started.finalizer.detach()  # to close the batch needs a lock that may be taken here
            self._started = None

    @property
    def _batch(self) -> ContinuousBatch:
        return self._running().batch

    def encode(self, pixel_values: Sequence[Floats]) -> list[DeviceArray]:
        """As `ResidentVision.encode`, from any thread."""
        running = self._running()
        return running.batch.call(lambda: running.vision.encode(pixel_values))

    def upload(self, image_features: Floats | DeviceArray) -> DeviceArray:
        """Features `(N, D)` float32 in this device's memory: the given array if it is there already, else a copy."""
        if isinstance(image_features, DeviceArray):
            if image_features.memory.is_same(self._memory):
                return image_features
            image_features = image_features.download()
        features = self._memory.allocate(image_features.shape, np.float32)
        features.upload(np.asarray(image_features, dtype=np.float32))
        return features

    def answer(self, requests: Sequence[DecodeRequest]) -> list[GeneratedSequence | FlorenceError]:
        """Answers prompts, in one batch with those of other threads.

        Returns:
            For each request its answer, or the error that ended it: the device failed, or its memory is full.
        """
        for request in requests:
            self._batch.submit(request)
        try:
            self._batch.wait(lambda: _all_done(requests))
            return [_outcome(request) for request in requests]
        finally:
            self._batch.cancel(requests)

    def answer_stream(self, stream: Iterable[Sequence[DecodeRequest]]) -> list[GeneratedSequence | FlorenceError]:
        """Answers prompts while the stream still makes requests: decoding overlaps with the encoding of further images.

        Args:
            stream: Requests, some at a time; iterated over in a thread of its own.

        Returns:
            As `answer`, in the order of the requests.

        Raises:
            Exception: What iterating over the stream raised.
        """
        from concurrent.futures import ThreadPoolExecutor

        requests: list[DecodeRequest] = []
        is_stopped = threading.Event()
        try:
            with ThreadPoolExecutor(1) as pool:
                submitting = pool.submit(self._submit_all, stream, requests, is_stopped)
                submitting.add_done_callback(lambda _: self._batch.notify())
                try:
                    self._batch.wait(
                        lambda: submitting.done() and (submitting.exception() is not None or _all_done(requests))
                    )
                finally:
                    is_stopped.set()
                submitting.result()
            return [_outcome(request) for request in requests]
        finally:
            self._batch.cancel(requests)  # after the pool has ended, so that no request is submitted behind it

    def _submit_all(
        self, stream: Iterable[Sequence[DecodeRequest]], requests: list[DecodeRequest], is_stopped: threading.Event
    ) -> None:
        for some in stream:
            if is_stopped.is_set():
                return
            for request in some:
                requests.append(request)
                self._batch.submit(request)


def _outcome(request: DecodeRequest) -> GeneratedSequence | FlorenceError:
    try:
        return request.result()
    except FlorenceError as error:
        return error


def _all_done(requests: Sequence[DecodeRequest]) -> bool:
    return all(request.is_done for request in requests)
