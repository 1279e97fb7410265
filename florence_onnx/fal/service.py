"""One model behind a bounded queue: requests that wait together run as one batch.

A request passes three stages, each with threads of its own, so that none waits for another's kind of work: its image is fetched and
decoded, the model answers, the annotated image is drawn. Nobody waits for company: a batch is what is ready at the
moment when the model is free, so a lone request is as fast as without batches.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, to_dict
from florence_onnx.errors import InputError
from florence_onnx.fal import contract, problems
from florence_onnx.fal.feature_cache import FeatureCache
from florence_onnx.fal.images import ImageLimits, ImageReader
from florence_onnx.fal.jobs import Answer, Figures, Job, Priority
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tasks import Task

_log = logging.getLogger("florence_onnx")

Publish = Callable[[Prediction[Any]], Mapping[str, Any] | None]
"""Makes fal's `image` of an answer with geometry."""
Observe = Callable[[str, float], None]
"""Told a stage and its seconds, or `batch_size` and a size."""


def as_data_uri(prediction: Prediction[Any]) -> Mapping[str, Any] | None:
    """The annotated image inside the JSON."""
    described: dict[str, Any] | None = to_dict(prediction.image)
    return described


def without_image(prediction: Prediction[Any]) -> None:
    """No annotated image: `image` is null."""


DEVICE_WORKERS = 4
"""Batches at a time of a model on a card."""


@dataclass(frozen=True)
class ServiceSettings:
    """How much a service takes on."""

    image_limits: ImageLimits = field(default_factory=ImageLimits)
    max_waiting: int = 256
    """Requests that wait; more are refused."""
    max_batch: int = 8
    """Requests that run together."""
    workers: int | None = None
    """Batches at a time. None: `DEVICE_WORKERS` where the model decodes prompts of all callers together, which late ones join, so that
    more are in flight; else 1, since each batch uses all of the model's threads."""
    loaders: int = 4
    """Images that are fetched and decoded at a time."""
    max_loaded: int = 8
    """Decoded images that wait for the model: they are what takes memory."""
    feature_cache_bytes: int = 256 * 2**20
    """For images that were encoded lately, with their features; 0 keeps none."""
    options: GenerationOptions = contract.DEFAULT_OPTIONS
    """Generation options of all requests, over the bundle's."""
    allow_options: bool = False
    """Whether requests may state generation options, as more fields; they go over `options`. Otherwise such fields are ignored, as
    all that an endpoint does not know."""


class Service:
    """Answers requests with one model. Safe in threads; `close` ends it."""

    def __init__(
        self,
        model: Florence2,
        settings: ServiceSettings | None = None,
        *,
        publish: Publish = as_data_uri,
        find_own: Callable[[str], bytes | None] | None = None,
        observe: Observe | None = None,
    ) -> None:
        """Args:
        model: What answers.
        settings: Limits.
        publish: Makes fal's `image` of an answer; called in a thread of its own.
        find_own: See `ImageReader`.
        observe: Told what each stage took.
        """
        self.model = model
        self.settings = settings or ServiceSettings()
        if self.settings.options != contract.DEFAULT_OPTIONS:
            model.check_options(self.settings.options)
        self._publish = publish
        self._observe = observe or (lambda stage, value: None)
        self._reader = ImageReader(self.settings.image_limits, find_own)
        self._cache = FeatureCache(self.settings.feature_cache_bytes)
        self._condition = threading.Condition()
        self._waiting: list[Job] = []  # accepted, image not looked at
        self._loading: set[Job] = set()
        self._ready: list[Job] = []  # image loaded
        self._running: set[Job] = set()
        self._counts = {"finished": 0, "failed": 0, "batches": 0, "encoded": 0, "reused": 0}
        self._is_open = True
        self._drawers = ThreadPoolExecutor(self.settings.loaders, thread_name_prefix="florence-draw")
        loops = [self._load_loop] * self.settings.loaders + [self._answer_loop] * (
            self.settings.workers or (DEVICE_WORKERS if model.max_batch else 1)
        )
        # daemons: an interpreter that ends does not wait for requests that nobody asks for any more; `close` does
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
        """Accepts a request.

        Args:
            application: Endpoint id, such as `fal-ai/florence-2-large/object-detection`.
            arguments: As fal takes them.
            start_timeout: Seconds that it may wait before the model begins.
            priority: Requests of `"low"` priority wait until no others do.

        Returns:
            The job. Wrong arguments fail the job, as at fal, rather than this call.

        Raises:
            RequestError: There is no such endpoint, the queue is full, or the service is closed.
        """
        task = contract.find_task(application)
        deadline = None if start_timeout is None else time.monotonic() + start_timeout
        try:
            job = Job(self._read(task, arguments), priority, deadline)
        except RequestError as problem:
            job = Job(contract.Question(task, ""), priority, deadline)
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

    def _read(self, task: Task[Any], arguments: object) -> contract.Question:
        if not self.settings.allow_options:
            return contract.read_arguments(task, arguments, self.settings.options)
        return contract.read_arguments(task, arguments, self.settings.options, self.model.check_options)

    def cancel(self, job: Job) -> bool:
        """Takes a request back; False if it has ended already. What the model is at is finished and thrown away."""
        is_cancelled = job.cancel()
        if is_cancelled:
            self._count("failed")
        with self._condition:
            self._condition.notify_all()
        return is_cancelled

    def position(self, job: Job) -> int:
        """How many requests come before a waiting one."""
        with self._condition:
            before = [other for other in (*self._waiting, *self._loading, *self._ready) if other.is_waiting]
        return sum(_rank(other) < _rank(job) for other in before)

    def figures(self) -> Figures:
        """What it is doing."""
        with self._condition:
            waiting = len(self._waiting) + len(self._loading) + len(self._ready)
            return Figures(waiting, len(self._running), **self._counts)

    def stop_accepting(self) -> None:
        """Refuses new requests; those that were accepted are finished."""
        with self._condition:
            self._is_open = False
            self._condition.notify_all()

    def close(self, timeout: float | None = None) -> bool:
        """Accepts nothing more and finishes what was accepted.

        Args:
            timeout: Seconds; what is not done by then is failed with 503.

        Returns:
            Whether everything was finished.
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
        for thread in self._threads if is_done else ():
            thread.join()
        self._drawers.shutdown(wait=is_done)
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
            except Exception:  # noqa: BLE001 - the last resort: one request must not end the thread that serves all
                _log.exception("request %s: reading the image failed", job.id)
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
        content = self._reader.read(job.question.image_url)
        job.digest = hashlib.sha256(content).digest()
        if self._cache.get(job.digest) is None:
            job.image = self._reader.decode(content)
        self._note(job, "load", begin)

    def _drop_ended(self) -> None:
        """Takes out what was cancelled or has waited too long; the lock is held."""
        for queue in (self._waiting, self._ready):
            for job in [job for job in queue if not job.is_waiting or job.has_expired]:
                queue.remove(job)
                if job.is_waiting:
                    self._fail(job, problems.timed_out())
                self._condition.notify_all()
        for job in [job for job in self._loading if job.is_waiting and job.has_expired]:
            self._fail(job, problems.timed_out())  # the caller is told now; the download ends by itself

    def _seconds_to_expiry(self) -> float | None:
        jobs = (*self._waiting, *self._loading, *self._ready)
        deadlines = [job.deadline for job in jobs if job.deadline is not None and job.is_waiting]
        return max(0.0, min(deadlines) - time.monotonic()) + 0.001 if deadlines else None

    # ----------------------------------------------------------------------------------------------------- answering

    def _answer_loop(self) -> None:
        while (batch := self._next_batch()) is not None:
            try:
                self._answer(batch)
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
                alike = [job for job in ranked if job.question.options == ranked[0].question.options]
                chosen = alike[: self.settings.max_batch]
                batch = [job for job in chosen if job.start()]
                self._ready = [job for job in self._ready if job not in chosen]
                self._running.update(batch)
                if batch:
                    self._counts["batches"] += 1
                    self._condition.notify_all()  # there is room for images again
                    break
                if not self._is_open and not (self._waiting or self._loading or self._ready):
                    return None
                self._condition.wait(self._seconds_to_expiry())
        self._observe("batch_size", len(batch))
        for job in batch:
            self._observe("queue", job.seconds["queue"])
        return batch

    def _answer(self, batch: Sequence[Job]) -> None:
        encoded = self._encode(batch)
        alive = [job for job in batch if job in encoded and job.state == "IN_PROGRESS"]
        for job in batch:
            if job not in alive:
                self._forget(job)
        self._decode(alive, encoded)

    def _encode(self, batch: Sequence[Job]) -> dict[Job, EncodedImage]:
        """Runs the vision encoder once for each image that is not at hand."""
        by_digest: dict[bytes, EncodedImage] = {}
        encoded = {}
        for job in batch:
            if job.state != "IN_PROGRESS":  # cancelled meanwhile
                continue
            begin = time.monotonic()
            found = by_digest.get(job.digest) or self._cache.get(job.digest)
            is_new = found is None
            if found is None:
                found = self.model.encode(self._image(job))
                self._cache.put(job.digest, found)
            by_digest[job.digest] = encoded[job] = found
            job.image = None
            self._count("encoded" if is_new else "reused")
            self._note(job, "vision", begin)
        return encoded

    def _image(self, job: Job) -> Any:
        # its features were at hand when it was loaded, and were dropped since
        return job.image if job.image is not None else self._reader.decode(self._reader.read(job.question.image_url))

    def _decode(self, jobs: Sequence[Job], encoded: Mapping[Job, EncodedImage]) -> None:
        if not jobs:
            return
        begin = time.monotonic()
        try:
            predictions = self.model.run_batch(
                [job.question.task for job in jobs],
                [encoded[job] for job in jobs],
                text_inputs=[job.question.text_input for job in jobs],
                regions=[job.question.region for job in jobs],
                options=jobs[0].question.options,
            )
        except InputError as error:  # such as a text too long for the model, known only once it is in tokens
            if len(jobs) > 1:
                for job in jobs:
                    self._decode([job], encoded)
                return
            field_name = "text_input" if jobs[0].question.text_input is not None else "image_url"
            self._fail(jobs[0], problems.invalid([field_error([field_name], str(error), "value_error")]))
            return
        for job, prediction in zip(jobs, predictions, strict=True):
            self._note(job, "decode", begin)
            self._drawers.submit(self._complete, job, prediction)

    def _complete(self, job: Job, prediction: Prediction[Any]) -> None:
        begin = time.monotonic()
        try:
            body = prediction.to_dict()
            if prediction.task.has_image:
                body["image"] = self._publish(prediction)
                self._note(job, "draw", begin)
        except Exception:  # noqa: BLE001 - as in _load_loop
            _log.exception("request %s: drawing failed", job.id)
            self._fail(job, problems.internal())
            return
        job.log(f"answered in {job.metrics['inference_time'] * 1000:.0f} ms")
        if job.finish(Answer(body, make_extra(prediction))):
            self._count("finished")
        self._forget(job)

    # ------------------------------------------------------------------------------------------------------ counting

    def _note(self, job: Job, stage: str, begin: float) -> None:
        job.seconds[stage] = time.monotonic() - begin
        self._observe(stage, job.seconds[stage])

    def _count(self, name: str) -> None:
        with self._condition:
            self._counts[name] += 1

    def _fail(self, job: Job, problem: RequestError) -> None:
        if job.fail(problem):
            self._count("failed")
        self._forget(job)

    def _forget(self, job: Job) -> None:
        with self._condition:
            self._running.discard(job)
            self._condition.notify_all()


def _rank(job: Job) -> tuple[bool, int]:
    return job.priority == "low", job.order


def make_extra(prediction: Prediction[Any]) -> dict[str, Any]:
    """What an answer holds beyond fal's JSON.

    Returns:
        `quads` (four points per text box), `polygons` (of an open-vocabulary answer), `text` (what the model said) and `truncated`;
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
