"""A bounded queue in front of one model; requests that wait at the same time run as one batch.

A request passes through three stages with a thread pool each, so that a slow download does not hold up the model:

```text
submit ─▶ waiting ─load threads: fetch and decode the image─▶ ready ─run threads: a batch through the model─▶ running
running ─draw threads: draw the annotated image, build fal's JSON─▶ Job.future
```

A batch is whatever is ready when a run thread becomes free. No request is held back to fill a batch, so batching adds
no latency to a lone request.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image as PILImage

from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, to_dict
from florence_onnx.errors import InputError
from florence_onnx.fal import contract, problems
from florence_onnx.fal.feature_cache import FeatureCache
from florence_onnx.fal.images import ImageLimits, ImageReader
from florence_onnx.fal.jobs import Answer, Job, Priority, Stats
from florence_onnx.fal.memory import MemoryBudget, NotWantedError
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.images.opening import DecodingEndedError
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tasks import Task

_log = logging.getLogger("florence_onnx")

Publish = Callable[[Prediction[Any]], Mapping[str, Any] | None]
"""Returns the `image` field of fal's JSON for a prediction with geometry."""
Observe = Callable[[str, float], None]
"""Called with the name of a stage and its seconds, or with `batch_size` and the size of a batch."""


def as_data_uri(prediction: Prediction[Any]) -> Mapping[str, Any] | None:
    """Puts the annotated image into the JSON as a `data:` URI."""
    described: dict[str, Any] | None = to_dict(prediction.image)
    return described


def without_image(prediction: Prediction[Any]) -> None:
    """Draws no annotated image: `image` is null."""


DEVICE_WORKERS = 4
"""Batches in flight for a model on a GPU."""


@dataclass(frozen=True)
class ServiceSettings:
    """Limits of a service."""

    image_limits: ImageLimits = field(default_factory=ImageLimits)
    max_waiting: int = 256
    """Most requests that wait; further ones are rejected with 429."""
    max_batch: int = 8
    """Most requests of a batch."""
    workers: int | None = None
    """Batches in flight. None is `DEVICE_WORKERS` for a model with continuous batching, whose batches share its decode
    steps, and 1 for any other, where one batch already uses all threads of the model."""
    loaders: int = 4
    """Threads that fetch and decode images, and threads that draw them."""
    max_loaded: int = 8
    """Most decoded images that wait for the model."""
    max_decoded_bytes: int = 2**30
    """Most bytes of images that are being decoded, wait for the model, are answered or are drawn on. A request whose image
    has no room yet waits. Cached images count towards `feature_cache_bytes`."""
    feature_cache_bytes: int = 256 * 2**20
    """Most bytes of cached image features; 0 caches none."""
    options: GenerationOptions = contract.DEFAULT_OPTIONS
    """Generation options of all requests, over the bundle's."""
    allow_options: bool = False
    """Whether requests may state generation options as further fields, over `options`. Otherwise such fields are ignored,
    like all unknown ones."""


class Service:
    """Runs requests on one model. Thread-safe. `close` ends its threads."""

    def __init__(
        self,
        model: Florence2,
        settings: ServiceSettings | None = None,
        *,
        publish: Publish = as_data_uri,
        find_stored: Callable[[str], bytes | None] | None = None,
        observe: Observe | None = None,
    ) -> None:
        """Starts the threads.

        Args:
            model: The loaded model.
            settings: Limits; the defaults if None.
            publish: Returns the `image` field of a result; called in a draw thread.
            find_stored: See `ImageReader`.
            observe: Called with the seconds of every stage and the size of every batch, in any thread.
        """
        self.model = model
        self.settings = settings or ServiceSettings()
        if self.settings.options != contract.DEFAULT_OPTIONS:
            model.check_options(self.settings.options)
        self._publish = publish
        self._observe = observe or (lambda stage, value: None)
        self._reader = ImageReader(self.settings.image_limits, find_stored)
        self._cache = FeatureCache(self.settings.feature_cache_bytes)
        self._memory = MemoryBudget(self.settings.max_decoded_bytes + self.settings.feature_cache_bytes)
        self._draws = publish is not without_image
        self._condition = threading.Condition()
        self._waiting: list[Job] = []  # accepted, image not loaded
        self._loading: set[Job] = set()
        self._ready: list[Job] = []  # image loaded
        self._running: set[Job] = set()
        self._counts = {"finished": 0, "failed": 0, "batches": 0, "encoded": 0, "reused": 0}
        self._is_open = True
        self._draw_pool = ThreadPoolExecutor(self.settings.loaders, thread_name_prefix="florence-draw")
        loops = [self._load_loop] * self.settings.loaders + [self._run_loop] * (
            self.settings.workers or (DEVICE_WORKERS if model.max_batch else 1)
        )
        # daemon threads: the interpreter must be able to exit while requests are in flight; `close` waits for them
        self._threads = [threading.Thread(target=loop, name=f"florence{loop.__name__}", daemon=True) for loop in loops]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------------------------------------------ requests

    def submit(
        self,
        application: str,
        arguments: object,
        *,
        start_timeout: float | None = None,
        priority: Priority = "normal",
    ) -> Job:
        """Puts a request into the queue.

        Args:
            application: Endpoint id, such as `fal-ai/florence-2-large/object-detection`.
            arguments: fal's arguments.
            start_timeout: Seconds that the request may wait before the model starts on it.
            priority: A `"low"` request waits until no normal one does.

        Returns:
            The job. As at fal, invalid arguments fail the job rather than this call.

        Raises:
            RequestError: There is no such endpoint, the queue is full, or the service is closed.
        """
        task = contract.find_task(application)
        deadline = None if start_timeout is None else time.monotonic() + start_timeout
        try:
            job = Job(self._read(task, arguments), priority, deadline)
        except RequestError as problem:
            job = Job(contract.Arguments(task, ""), priority, deadline)
            self._fail(job, problem)
            return job
        with self._condition:
            if not self._is_open:
                raise problems.shutting_down()
            if len(self._waiting) + len(self._loading) + len(self._ready) >= self.settings.max_waiting:
                raise problems.queue_full(self.settings.max_waiting)
            self._waiting.append(job)
            self._condition.notify_all()
        return job

    def _read(self, task: Task[Any], arguments: object) -> contract.Arguments:
        if not self.settings.allow_options:
            return contract.read_arguments(task, arguments, self.settings.options)
        return contract.read_arguments(task, arguments, self.settings.options, self.model.check_options)

    def cancel(self, job: Job) -> bool:
        """Cancels a request; returns False if it has already ended.

        The model does not stop in the middle of a batch: the result of a running request is computed and discarded.
        """
        is_cancelled = job.cancel()
        if is_cancelled:
            self._count("failed")
            self._end_loading(job)
        with self._condition:
            self._condition.notify_all()
        return is_cancelled

    def position(self, job: Job) -> int:
        """Returns the number of requests ahead of a waiting one."""
        with self._condition:
            before = [other for other in (*self._waiting, *self._loading, *self._ready) if other.is_waiting]
        return sum(_rank(other) < _rank(job) for other in before)

    def stats(self) -> Stats:
        """Returns the current counts."""
        with self._condition:
            waiting = len(self._waiting) + len(self._loading) + len(self._ready)
            return Stats(waiting, len(self._running), **self._counts)

    def stop_accepting(self) -> None:
        """Rejects new requests from now on; accepted ones are finished."""
        with self._condition:
            self._is_open = False
            self._condition.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Rejects new requests and waits for the accepted ones.

        Args:
            timeout: Seconds to wait, None for no limit. Requests that have not ended by then fail with 503.

        Returns:
            Whether all requests ended in time.
        """
        self.stop_accepting()
        with self._condition:
            is_done = self._condition.wait_for(self._is_idle, timeout)
            left = [*self._waiting, *self._loading, *self._ready, *self._running]
            self._waiting.clear()
            self._ready.clear()
            self._condition.notify_all()
        for job in left:
            self._fail(job, problems.shutting_down())
        self._reader.close()
        for thread in self._threads if is_done else ():
            thread.join()
        self._draw_pool.shutdown(wait=is_done)
        return is_done

    def _is_idle(self) -> bool:
        return not (self._waiting or self._loading or self._ready or self._running)

    # ------------------------------------------------------------------------------------------------------- loading

    def _load_loop(self) -> None:
        while (job := self._next_to_load()) is not None:
            try:
                self._load(job)
            except RequestError as problem:
                self._fail(job, problem)
            except (
                DecodingEndedError,
                NotWantedError,
            ):  # of a job that has ended, which stays as it is, or will at once
                self._fail(job, problems.timed_out() if job.has_expired else problems.shutting_down())
            except Exception:  # noqa: BLE001 - one request must not end the thread that serves all of them
                _log.exception("request %s: loading the image failed", job.id)
                self._fail(job, problems.internal())
            with self._condition:
                self._loading.discard(job)
                if job.is_waiting:
                    self._ready.append(job)
                self._condition.notify_all()

    def _next_to_load(self) -> Job | None:
        with self._condition:
            while True:
                self._drop_ended()
                has_room = len(self._loading) + len(self._ready) < self.settings.max_loaded
                if self._waiting and has_room:
                    job = min(self._waiting, key=_rank)
                    self._waiting.remove(job)
                    self._loading.add(job)
                    return job
                if not self._is_open and not self._waiting:
                    return None
                self._condition.wait(self._seconds_to_expiry())

    def _load(self, job: Job) -> None:
        begin = time.monotonic()
        content = self._reader.read(job.arguments.image_url)
        job.digest = hashlib.sha256(content).digest()
        job.encoded = self._cache.get(job.digest)
        if job.encoded is None:
            job.image = self._decode_image(job, content)
        self._record(job, "load", begin)

    def _decode_image(self, job: Job, content: bytes) -> PILImage.Image:
        """Decodes an image when there is memory for it and for drawing on it."""
        taken = kept = drawing = 0

        def admit(peak_bytes: int, result_bytes: int) -> None:
            nonlocal taken, kept, drawing
            kept, drawing = result_bytes, result_bytes if self._draws and job.arguments.task.has_image else 0
            self._memory.take(peak_bytes + drawing, lambda: job.is_waiting and not job.has_expired)
            taken = peak_bytes + drawing

        try:
            image = self._reader.decode(content, key=job, admit=admit)
        except BaseException:
            self._memory.give(taken)
            raise
        weakref.finalize(image, self._memory.give, kept).atexit = False
        self._memory.give(taken - kept - drawing)
        job.future.add_done_callback(lambda ended: self._memory.give(drawing))
        return image

    def _end_loading(self, job: Job) -> None:
        self._reader.end(job)
        self._memory.look()

    def _drop_ended(self) -> None:
        """Removes cancelled requests and fails expired ones. The caller holds the lock."""
        for queue in (self._waiting, self._ready):
            for job in [job for job in queue if not job.is_waiting or job.has_expired]:
                queue.remove(job)
                if job.is_waiting:
                    self._fail(job, problems.timed_out())
                self._condition.notify_all()
        for job in [job for job in self._loading if job.is_waiting and job.has_expired]:
            self._fail(job, problems.timed_out())  # at once; the download runs into its own timeout
            self._end_loading(job)

    def _seconds_to_expiry(self) -> float | None:
        jobs = (*self._waiting, *self._loading, *self._ready)
        deadlines = [job.deadline for job in jobs if job.deadline is not None and job.is_waiting]
        return max(0.0, min(deadlines) - time.monotonic()) + 0.001 if deadlines else None

    # ------------------------------------------------------------------------------------------------------- running

    def _run_loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._run(batch)
            except Exception:  # noqa: BLE001 - as in _load_loop
                _log.exception("a batch of %d failed", len(batch))
                for job in batch:
                    self._fail(job, problems.internal())

    def _next_batch(self) -> list[Job] | None:
        with self._condition:
            while True:
                self._drop_ended()
                ranked = sorted(self._ready, key=_rank)
                # a batch is one search, so all of it has the options of its first
                alike = [job for job in ranked if job.arguments.options == ranked[0].arguments.options]
                chosen = alike[: self.settings.max_batch]
                batch = [job for job in chosen if job.start()]
                self._ready = [job for job in self._ready if job not in chosen]
                self._running.update(batch)
                if batch:
                    self._counts["batches"] += 1
                    self._condition.notify_all()  # the load threads may decode more images
                    break
                if not self._is_open and not (self._waiting or self._loading or self._ready):
                    return None
                self._condition.wait(self._seconds_to_expiry())
        self._observe("batch_size", len(batch))
        for job in batch:
            self._observe("queue", job.seconds["queue"])
        return batch

    def _run(self, batch: Sequence[Job]) -> None:
        encoded = self._encode(batch)
        active = [job for job in batch if job in encoded and job.state == "IN_PROGRESS"]
        for job in batch:
            if job not in active:
                self._release(job)
        self._decode(active, encoded)

    def _encode(self, batch: Sequence[Job]) -> dict[Job, EncodedImage]:
        """Returns the image features of each job; runs the vision encoder once for each image that is not cached."""
        by_digest: dict[bytes, EncodedImage] = {}
        encoded = {}
        for job in batch:
            if job.state != "IN_PROGRESS":  # cancelled in the meantime
                continue
            begin = time.monotonic()
            found = by_digest.get(job.digest) or job.encoded or self._cache.get(job.digest)
            is_new = found is None
            if found is None:
                assert job.image is not None
                found = self.model.encode(job.image, copy=False)
                self._cache.put(job.digest, found)
            by_digest[job.digest] = encoded[job] = found
            job.image = job.encoded = None
            self._count("encoded" if is_new else "reused")
            self._record(job, "vision", begin)
        return encoded

    def _decode(self, jobs: Sequence[Job], encoded: Mapping[Job, EncodedImage]) -> None:
        if not jobs:
            return
        begin = time.monotonic()
        try:
            predictions = self.model.run_batch(
                [job.arguments.task for job in jobs],
                [encoded[job] for job in jobs],
                text_inputs=[job.arguments.text_input for job in jobs],
                regions=[job.arguments.region for job in jobs],
                options=jobs[0].arguments.options,
            )
        except InputError as error:
            # for example a text that is too long, which shows only once it is tokenized; find out whose it is
            if len(jobs) > 1:
                for job in jobs:
                    self._decode([job], encoded)
                return
            field_name = "text_input" if jobs[0].arguments.text_input is not None else "image_url"
            self._fail(jobs[0], problems.invalid([field_error([field_name], str(error), "value_error")]))
            return
        for job, prediction in zip(jobs, predictions, strict=True):
            self._record(job, "decode", begin)
            self._draw_pool.submit(self._complete, job, prediction)

    def _complete(self, job: Job, prediction: Prediction[Any]) -> None:
        begin = time.monotonic()
        try:
            body = prediction.to_dict()
            if prediction.task.has_image:
                body["image"] = self._publish(prediction)
                self._record(job, "draw", begin)
        except Exception:  # noqa: BLE001 - as in _load_loop
            _log.exception("request %s: building the result failed", job.id)
            self._fail(job, problems.internal())
            return
        job.log(f"finished in {job.metrics['inference_time'] * 1000:.0f} ms")
        if job.finish(Answer(body, make_extra(prediction))):
            self._count("finished")
        self._release(job)

    # ------------------------------------------------------------------------------------------------------- counts

    def _record(self, job: Job, stage: str, begin: float) -> None:
        job.seconds[stage] = time.monotonic() - begin
        self._observe(stage, job.seconds[stage])

    def _count(self, name: str) -> None:
        with self._condition:
            self._counts[name] += 1

    def _fail(self, job: Job, problem: RequestError) -> None:
        if job.fail(problem):
            self._count("failed")
        self._release(job)

    def _release(self, job: Job) -> None:
        with self._condition:
            self._running.discard(job)
            self._condition.notify_all()


def _rank(job: Job) -> tuple[bool, int]:
    return job.priority == "low", job.order


def make_extra(prediction: Prediction[Any]) -> dict[str, Any]:
    """Builds the fields that fal's JSON does not have.

    Returns:
        `quads` (four points for each text box), `polygons` (of open-vocabulary detection), `text` (the generated text,
        location tokens included) and `truncated` (whether generation stopped at the token limit);
        `alternatives` (the results of further answers) where `num_return_sequences` asks for some.
    """
    results = prediction.results
    quads: Iterable[Any] = (box.quad for box in results.quad_boxes) if isinstance(results, OCRBoundingBox) else ()
    polygons = results.polygons if isinstance(results, BoundingBoxes) else ()
    others = [other.to_dict()["results"] for other in prediction.alternatives]
    return {
        "quads": [to_dict(quad) for quad in quads],
        "polygons": to_dict(polygons),
        "text": prediction.text,
        "truncated": prediction.truncated,
        **({"alternatives": others} if others else {}),
    }
