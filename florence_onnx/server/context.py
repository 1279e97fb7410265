"""What all routes of one server share."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from florence_onnx.answers.results import Image, to_dict
from florence_onnx.fal.contract import APP
from florence_onnx.fal.jobs import Job
from florence_onnx.fal.service import Publish, Service, as_data_uri, without_image
from florence_onnx.model import Florence2
from florence_onnx.prediction import Prediction, encode_png
from florence_onnx.server.file_store import FileStore
from florence_onnx.server.metrics import Metrics
from florence_onnx.server.results_store import ResultsStore
from florence_onnx.server.settings import ServerSettings

TOKEN_SECONDS = 3600.0
"""How long a token for uploads is good."""
_log = logging.getLogger("florence_onnx.server")


class ServerContext:
    """The model's service, the stores, and whether we are shutting down."""

    def __init__(self, model: Florence2, settings: ServerSettings) -> None:
        """Args:
        model: Loaded.
        settings: All limits.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.files = FileStore(settings.max_files_bytes)
        self.results = ResultsStore(settings.max_results, settings.result_seconds)
        publishers: dict[str, Publish] = {"url": self._publish, "data": as_data_uri, "none": without_image}
        self.service = Service(
            model,
            settings.service,
            publish=publishers[settings.images],
            find_own=self.files.find,
            observe=self.metrics.observe,
        )
        self.metrics.watch(self.service.figures)
        self.num_active = 0
        """Requests that are being answered; only the event loop changes it."""
        self._tokens: dict[str, float] = {}
        self._tokens_lock = threading.Lock()
        self.is_draining = False
        """Whether new work is refused."""
        self._idle_since: float | None = None

    # ---------------------------------------------------------------------------------------------------- shutting down

    def begin_to_drain(self) -> None:
        """Accepts nothing new; what was accepted is finished and can be fetched."""
        self.is_draining = True
        self.service.stop_accepting()

    def is_drained(self) -> bool:
        """Whether all accepted work is done and handed over, or its time to be fetched is up."""
        figures = self.service.figures()
        if not self.is_draining or figures.waiting or figures.in_progress:
            return False
        self._idle_since = self._idle_since or time.monotonic()
        unfetched = self.results.num_unfetched()
        is_up = time.monotonic() - self._idle_since > self.settings.grace_seconds
        if is_up and (unfetched or self.num_active):
            _log.warning("ending with %d results unfetched and %d connections busy", unfetched, self.num_active)
        return is_up or not (unfetched or self.num_active)

    def close(self) -> None:
        """Ends the service and removes the files."""
        self.service.close(timeout=0)
        self.files.close()

    # ----------------------------------------------------------------------------------------------------------- answers

    def status(self, job: Job, base_url: str, *, with_logs: bool) -> dict[str, Any]:
        """fal's description of where a request of the queue stands."""
        url = f"{base_url}/queue/{APP}/requests/{job.id}"
        state = job.state
        described: dict[str, Any] = {
            "status": state,
            "request_id": job.id,
            "response_url": url,
            "status_url": f"{url}/status",
            "cancel_url": f"{url}/cancel",
        }
        if state == "IN_QUEUE":
            return {**described, "queue_position": self.service.position(job)}
        described["logs"] = list(job.logs) if with_logs else None
        if state == "COMPLETED":
            described["metrics"] = job.metrics
            problem = job.problem
            if problem is not None:
                described |= {"error": str(problem), "error_type": problem.body.get("error_type")}
        return described

    def body(self, job: Job, base_url: str, *, with_extra: bool = False) -> dict[str, Any]:
        """The JSON of an answer; images that we serve get whole addresses.

        Raises:
            RequestError: The request ended without an answer.
        """
        answer = job.future.result(0)
        body = dict(answer.body)
        image = body.get("image")
        if image and image["url"].startswith("/"):
            body["image"] = {**image, "url": base_url + image["url"]}
        return {**body, "extra": answer.extra} if with_extra else body

    def _publish(self, prediction: Prediction[Any]) -> Mapping[str, Any]:
        content = encode_png(prediction.draw())
        name = f"{prediction.task.slug}.png"
        width, height = prediction.source_image.size
        address = self.files.put(content, name, "image/png")
        described: dict[str, Any] = to_dict(Image(address, "image/png", name, len(content), width, height))
        return described

    # ------------------------------------------------------------------------------------------------------------- keys

    def is_key(self, given: str) -> bool:
        """Whether a key is ours; takes equally long for every wrong one."""
        expected = self.settings.api_key
        return expected is None or secrets.compare_digest(given.encode(), expected.encode())

    def make_token(self) -> str:
        """A token for uploads."""
        token = secrets.token_urlsafe(32)
        now = time.monotonic()
        with self._tokens_lock:
            self._tokens = {each: end for each, end in self._tokens.items() if end > now}
            self._tokens[token] = now + TOKEN_SECONDS
        return token

    def is_token(self, given: str) -> bool:
        """Whether a token was made here and is still good."""
        with self._tokens_lock:
            return self._tokens.get(given, 0.0) > time.monotonic()
