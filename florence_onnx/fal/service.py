"""A bounded queue in front of one model; requests that wait at the same time run as one batch.

A request passes through stages with a thread pool each, so that a slow download holds up neither the model nor an image
that came with its request:

```text
submit ─▶ waiting ─download threads: fetch the image, if it has a URL─▶ waiting
waiting ─load threads: decode the image─▶ ready ─run threads: a batch through the model─▶ running
running ─draw threads: draw the annotated image, build fal's JSON─▶ Job.future
```

A batch is whatever is ready when a run thread becomes free. No request is held back to fill a batch, so batching adds
no latency to a lone request.
"""

from __future__ import annotations

import hashlib
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from florence_onnx import forks
from florence_onnx.answers.results import BoundingBoxes, OCRBoundingBox, to_dict
from florence_onnx.errors import InputError
from florence_onnx.fal import contract, extensions, problems
from florence_onnx.fal.byte_budget import ByteBudget
from florence_onnx.fal.downloads import Downloads
from florence_onnx.fal.extensions import ClassPrediction, check_num_tiles
from florence_onnx.fal.feature_cache import FeatureCache
from florence_onnx.fal.images import ImageLimits, ImageReader
from florence_onnx.fal.jobs import Answer, Job, Priority, Stats
from florence_onnx.fal.memory import MemoryBudget, NotWantedError
from florence_onnx.fal.problems import RequestError, field_error
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.generation.progress import OnTokens
from florence_onnx.images.opening import DecodingEndedError
from florence_onnx.images.transfer import Transfer
from florence_onnx.inference.ending import Seen
from florence_onnx.limits import OnIndexedTokens
from florence_onnx.model import Florence2
from florence_onnx.prediction import EncodedImage, Prediction
from florence_onnx.tasks import Task

_log = logging.getLogger("florence_onnx")

Publish = Callable[[Prediction[Any], str], Mapping[str, Any] | None]
"""Returns the `image` field of fal's JSON for a prediction with geometry and the owner of the request."""
Observe = Callable[[str, float], None]
"""Called with the name of a stage and its seconds, or with `batch_size` and the size of a batch."""


def as_data_uri(prediction: Prediction[Any], owner: str = "") -> Mapping[str, Any] | None:
    """Puts the annotated image into the JSON as a `data:` URI."""
    described: dict[str, Any] | None = to_dict(prediction.image)
    return described


def without_image(prediction: Prediction[Any], owner: str = "") -> None:
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
    """Threads that decode images, and threads that draw them."""
    downloads: int = 16
    """Downloads at the same time."""
    downloads_per_host: int = 4
    """Downloads from the same host at the same time."""
    max_accepted_bytes: int = 512 * 2**20
    """Most bytes of the arguments and downloads of all requests that have not ended; further requests are rejected with
    429."""
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
        find_stored: Callable[[str], Path | None] | None = None,
        observe: Observe | None = None,
    ) -> None:
        """Starts the threads; in a forked child they are started anew by its first request.

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
        self._draws = publish is not without_image
        self._is_open = True
        self._clear()
        self._start_threads()
        forks.call_in_child(self._clear)

    def _clear(self) -> None:
        """Empties all queues and forgets the threads; what was in the queues at a fork is the parent's."""
        self.budget = ByteBudget(self.settings.max_accepted_bytes)
        """Bytes held for requests that have not ended."""
        self._memory = MemoryBudget(self.settings.max_decoded_bytes + self.settings.feature_cache_bytes)
        self._condition = threading.Condition()
        self._waiting: list[Job] = []  # accepted, image not loaded
        self._downloads = Downloads(self.settings.downloads, self.settings.downloads_per_host)
        self._loading: set[Job] = set()
        self._ready: list[Job] = []  # image loaded
        self._running: set[Job] = set()
        self._counts = {"finished": 0, "failed": 0, "batches": 0, "encoded": 0, "reused": 0}
        self._draw_pool: ThreadPoolExecutor | None = None
        self._threads: list[threading.Thread] = []

    def _start_threads(self) -> None:
        self._draw_pool = ThreadPoolExecutor(self.settings.loaders, thread_name_prefix="florence-draw")
        loops = [self._download_loop] * self.settings.downloads + [self._load_loop] * self.settings.loaders
        loops += [self._run_loop] * (self.settings.workers or (DEVICE_WORKERS if self.model.max_batch else 1))
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
        owner: str = "",
        on_tokens: OnTokens | None = None,
        on_prediction: Callable[[Prediction[Any]], None] | None = None,
    ) -> Job:
        """Puts a request into the queue.

        Args:
            application: Endpoint id, such as `fal-ai/florence-2-large/object-detection`.
            arguments: fal's arguments.
            start_timeout: Seconds that the request may wait before the model starts on it.
            priority: A `"low"` request waits until no normal one does.
            owner: The client that asks.
            on_tokens: Called after every decode step with the answer's tokens so far and the image; see
                `Florence2.run_batch`.
            on_prediction: Called with the answer, before its annotated image is drawn.

        Returns:
            The job. As at fal, invalid arguments fail the job rather than this call.

        Raises:
            RequestError: There is no such endpoint, the queue or the budget of bytes is full, or the service is closed.
        """
        task = contract.find_task(application, self.model.tasks)
        deadline = None if start_timeout is None else time.monotonic() + start_timeout
        try:
            job = Job(self._read(task, arguments), priority, deadline, owner)
        except RequestError as problem:
            job = Job(contract.Arguments(task, ""), priority, deadline, owner)
            self._fail(job, problem)
            return job
        # which boxes stay is known with their scores, at the end: until then none may be told of, as no part is taken back
        job.on_tokens = on_tokens if job.arguments.extensions.min_score is None else None
        job.on_prediction = on_prediction
        job.needs_download = self._reader.needs_download(job.arguments.image_url)
        with self._condition:
            if not self._is_open:
                raise problems.shutting_down()
            if len(self._waiting) + len(self._loading) + len(self._ready) >= self.settings.max_waiting:
                raise problems.queue_full(self.settings.max_waiting)
            job.charge = self.budget.charge(_num_bytes(job.arguments))
            if not self._threads:
                self._start_threads()
            self._waiting.append(job)
            self._condition.notify_all()
        return job

    def _read(self, task: Task[Any], arguments: object) -> contract.Arguments:
        check_options = self.model.check_options if self.settings.allow_options else None
        return contract.read_arguments(
            task, arguments, self.settings.options, check_options, self.model.check_prompt_bytes
        )

    def cancel(self, job: Job) -> bool:
        """Cancels a request; returns False if it has already ended.

        If the decoder is at it, it leaves the batch at the next step, and the others of the batch go on.
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
        if self._draw_pool is not None:
            self._draw_pool.shutdown(wait=is_done)
        return is_done

    def _is_idle(self) -> bool:
        return not (self._waiting or self._loading or self._ready or self._running)

    # ------------------------------------------------------------------------------------------------------- loading

    def _download_loop(self) -> None:
        while (job := self._next(self._take_download)) is not None:
            try:
                self._download(job)
            except RequestError as problem:
                self._fail(job, problem)
            except Exception as error:  # noqa: BLE001 - one request must not end the thread that serves all of them
                self._fail_unexpectedly(job, error, "downloading the image")
            with self._condition:
                self._downloads.remove(job)
                job.needs_download = False
                self._condition.notify_all()

    def _load_loop(self) -> None:
        while (job := self._next(self._take_load)) is not None:
            try:
                self._load(job)
            except RequestError as problem:
                self._fail(job, problem)
            except (
                DecodingEndedError,
                NotWantedError,
            ):  # of a job that has ended, which stays as it is, or will at once
                self._fail(job, problems.timed_out() if job.has_expired else problems.shutting_down())
            except Exception as error:  # noqa: BLE001 - as in _download_loop
                self._fail_unexpectedly(job, error, "loading the image")
            with self._condition:
                self._loading.discard(job)
                if job.is_waiting:
                    self._ready.append(job)
                self._condition.notify_all()

    def _next(self, take: Callable[[], Job | None]) -> Job | None:
        """Waits for a job of a stage; returns None once the service is closed and none is left."""
        with self._condition:
            while True:
                self._drop_ended()
                job = take()
                if job is not None:
                    return job
                if not self._is_open and not self._waiting:
                    return None
                self._condition.wait(self._seconds_to_expiry())

    def _take_download(self) -> Job | None:
        candidates = (job for job in self._waiting if job.needs_download)
        return self._downloads.take(sorted(candidates, key=_rank))

    def _take_load(self) -> Job | None:
        candidates = [job for job in self._waiting if not job.needs_download]
        if not candidates or len(self._loading) + len(self._ready) >= self.settings.max_loaded:
            return None
        job = min(candidates, key=_rank)
        self._waiting.remove(job)
        self._loading.add(job)
        return job

    def _download(self, job: Job) -> None:
        begin = time.monotonic()
        transfer = Transfer()
        if job.charge is not None:
            transfer.on_bytes = job.charge.grow
        stop = job.listen(lambda: None if job.is_waiting else transfer.cancel())
        try:
            content = self._reader.read(job.arguments.image_url, transfer)
        finally:
            stop()
        if job.is_waiting:
            job.content = content
        self._record(job, "download", begin)

    def _load(self, job: Job) -> None:
        begin = time.monotonic()
        content = job.content if job.content is not None else self._reader.read(job.arguments.image_url)
        job.digest = hashlib.sha256(content).digest()
        extended = job.arguments.extensions
        # tiles are made of the image, and their memory is admitted with it
        job.features = None if extended.tiles is not None else self._cache.get(job.digest)
        if job.features is None:
            job.image = self._decode_image(job, content)
            problem = check_num_tiles(extended, job.image.size)
            if problem is not None:
                raise problems.invalid([field_error(["tiles"], problem, "value_error")])
        job.drop_source()
        self._record(job, "load", begin)

    def _decode_image(self, job: Job, content: bytes) -> PILImage.Image:
        """Decodes an image when there is memory for it and for drawing on it."""
        taken = kept = drawing = 0

        def admit(peak_bytes: int, result_bytes: int) -> None:
            nonlocal taken, kept, drawing
            kept, drawing = result_bytes, result_bytes if self._draws and job.arguments.task.has_image else 0
            drawing += job.arguments.extensions.tile_bytes(result_bytes)
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
            self._fail(job, problems.timed_out())  # at once, whatever is being done for it
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
                if ranked and ranked[0].arguments.extensions.is_alone:
                    alike = ranked[:1]
                else:
                    alike = [job for job in alike if not job.arguments.extensions.is_alone]
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

    def _encode(self, batch: Sequence[Job]) -> dict[Job, Seen]:
        """Returns the image features of each job; runs the vision encoder once for each image that is not cached.

        The image itself of those that are asked in tiles, and of those that have no time left.
        """
        by_digest: dict[bytes, EncodedImage] = {}
        encoded: dict[Job, Seen] = {}
        for job in batch:
            if job.state != "IN_PROGRESS":  # cancelled in the meantime
                continue
            begin = time.monotonic()
            given = job.arguments.extensions
            if job.image is not None and (given.tiles is not None or given.has_ended):
                encoded[job], job.image = job.image, None
                continue
            found = by_digest.get(job.digest) or job.features or self._cache.get(job.digest)
            is_new = found is None
            if found is None:
                image = job.image
                assert image is not None  # loaded, and kept while the batch runs
                try:
                    found = self.model.encode(image, copy=False)
                except Exception as error:  # noqa: BLE001 - the other images of the batch may be fine
                    self._fail_unexpectedly(job, error, "the vision encoder")
                    continue
                self._cache.put(job.digest, found)
            by_digest[job.digest] = encoded[job] = found
            job.image = job.features = None
            self._count("encoded" if is_new else "reused")
            self._record(job, "vision", begin)
        return encoded

    def _decode(self, jobs: Sequence[Job], encoded: Mapping[Job, Seen]) -> None:
        if not jobs:
            return
        begin = time.monotonic()
        try:
            predictions = self._ask(jobs, [encoded[job] for job in jobs])
        except InputError as error:
            # for example a text that is too long, which shows only once it is tokenized; find out whose it is
            if len(jobs) > 1:
                for job in jobs:
                    self._decode([job], encoded)
                return
            field_name = "text_input" if jobs[0].arguments.text_input is not None else "image_url"
            field_name = "classes" if jobs[0].arguments.extensions.classes else field_name
            self._fail(jobs[0], problems.invalid([field_error([field_name], str(error), "value_error")]))
            return
        except Exception as error:  # noqa: BLE001 - what is wrong with one request must not fail the others
            if len(jobs) > 1:
                _log.exception("a batch of %d failed; its requests are tried one by one", len(jobs))
                for job in jobs:
                    self._decode([job], encoded)
                return
            self._fail_unexpectedly(jobs[0], error, "the decoder")
            return
        for job, prediction in zip(jobs, predictions, strict=True):
            self._record(job, "decode", begin)
            if job.state == "COMPLETED":  # cancelled in the meantime
                self._release(job)
                continue
            assert self._draw_pool is not None, "started with this thread"
            self._draw_pool.submit(self._complete, job, prediction)

    def _ask(self, jobs: Sequence[Job], images: Sequence[Seen]) -> Sequence[Prediction[Any]]:
        first = jobs[0].arguments
        if first.extensions.is_alone:
            alone = first.task, images[0], first.extensions, first.text_input, first.options, jobs[0].stop
            return [extensions.ask(self.model, *alone)]
        return self.model.run_batch(
            [job.arguments.task for job in jobs],
            images,
            text_inputs=[job.arguments.text_input for job in jobs],
            regions=[job.arguments.region for job in jobs],
            options=first.options,
            batch_size=len(jobs),
            deadline=[job.arguments.extensions.deadline for job in jobs],
            cancel=[job.stop for job in jobs],
            on_tokens=_listener(jobs),
        )

    def _complete(self, job: Job, prediction: Prediction[Any]) -> None:
        begin = time.monotonic()
        try:
            min_score = job.arguments.extensions.min_score
            if min_score is not None:
                prediction = prediction.above(min_score)
            if job.on_prediction is not None:
                job.on_prediction(prediction)
            body = prediction.to_dict()
            if prediction.task.has_image:
                body["image"] = self._publish(prediction, job.owner)
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

    def _fail_unexpectedly(self, job: Job, error: Exception, stage: str) -> None:
        if job.state != "COMPLETED":  # else it was cancelled, and nobody asks for the reason
            _log.error("request %s: %s failed", job.id, stage, exc_info=error)
        self._fail(job, problems.out_of_memory() if isinstance(error, MemoryError) else problems.internal())

    def _release(self, job: Job) -> None:
        if job.state == "COMPLETED":
            job.forget()
        with self._condition:
            self._running.discard(job)
            self._condition.notify_all()


def _listener(jobs: Sequence[Job]) -> OnIndexedTokens | None:
    """What tells those who follow the answers of a batch; None where nobody does."""
    listeners = [job.on_tokens for job in jobs]
    if not any(listeners):
        return None

    def tell(index: int, token_ids: Sequence[int], image: EncodedImage) -> None:
        listener = listeners[index]
        if listener is not None:
            listener(token_ids, image)

    return tell


def _num_bytes(arguments: contract.Arguments) -> int:
    texts = sys.getsizeof(arguments.image_url) + sys.getsizeof(arguments.text_input)
    return texts + arguments.extensions.num_bytes


def _rank(job: Job) -> tuple[bool, int]:
    return job.priority == "low", job.order


def make_extra(prediction: Prediction[Any]) -> dict[str, Any]:
    """Builds the fields that fal's JSON does not have.

    Returns:
        `quads` (four points for each text box), `polygons` (of open-vocabulary detection), `text` (the generated text,
        location tokens included) and `truncated` (whether generation stopped at the token limit);
        `alternatives` (the results of further answers) where `num_return_sequences` asks for some; with the option `scores`
        `scores` (of each box, quad or outline in their order), `sequence_logprob` and `text_score` (see `Prediction`).
        `choice_logprobs` (of every choice) where `constrain` gives choices; `presence` (see `ClassDetections`) of `classes`.
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
        **({"choice_logprobs": dict(prediction.choice_logprobs)} if prediction.choice_logprobs is not None else {}),
        **({"presence": dict(prediction.presence)} if isinstance(prediction, ClassPrediction) else {}),
        **({} if prediction.token_logprobs is None else _scores(prediction)),
    }


def _scores(prediction: Prediction[Any]) -> dict[str, Any]:
    results = prediction.results
    items = () if isinstance(results, str) else [item for part in vars(results).values() for item in part]
    return {
        "scores": [item.score for item in items],
        "sequence_logprob": prediction.sequence_logprob,
        "text_score": to_dict(prediction.text_score),
    }
