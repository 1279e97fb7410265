"""The state that all routes of one server share."""

from __future__ import annotations

import hmac
import logging
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from florence_onnx.answers.results import Image, to_dict
from florence_onnx.fal.contract import APP
from florence_onnx.fal.jobs import Job
from florence_onnx.fal.problems import RequestError
from florence_onnx.fal.service import Publish, Service, as_data_uri, without_image
from florence_onnx.model import Florence2
from florence_onnx.prediction import Prediction, encode_png
from florence_onnx.server.file_store import FileStore
from florence_onnx.server.listener import ConnectionLimit
from florence_onnx.server.metrics import Metrics
from florence_onnx.server.results_store import ResultsStore
from florence_onnx.server.settings import ServerSettings

TOKEN_SECONDS = 3600.0
"""Seconds for which an upload token is valid."""
BODY_THREADS = 1
"""Large bodies that are parsed at the same time: several would take as long, and keep the event loop waiting longer."""
_log = logging.getLogger("florence_onnx.server")


class ServerContext:
    """The service of the model, stored files, results of the queue, metrics, upload tokens and the shutdown state."""

    def __init__(self, model: Florence2, settings: ServerSettings) -> None:
        """Starts the service.

        Args:
            model: The loaded model.
            settings: Options and limits of the server.
        """
        self.settings = settings
        self.metrics = Metrics()
        self.files = FileStore(settings.max_files_bytes)
        self.results = ResultsStore(settings.max_results, settings.result_seconds, settings.max_results_bytes)
        publishers: dict[str, Publish] = {"url": self._publish, "data": as_data_uri, "none": without_image}
        self.service = Service(
            model,
            settings.service,
            publish=publishers[settings.images],
            find_stored=self.files.find_url,
            observe=self.metrics.observe,
        )
        self.metrics.add_service(self.service.stats)
        self.connections = ConnectionLimit(settings.max_connections)
        self.metrics.add_connections(lambda: (self.connections.num_open, self.connections.num_refused))
        self.body_pool = ThreadPoolExecutor(BODY_THREADS, thread_name_prefix="florence-body")
        """Parses large bodies."""
        self.num_active = 0
        """HTTP requests in flight; changed by the event loop only."""
        self._token_key = secrets.token_bytes(32)
        self.is_draining = False
        """Whether the server is shutting down and rejects new requests."""
        self._idle_since: float | None = None

    # ---------------------------------------------------------------------------------------------------- shutting down

    def start_draining(self) -> None:
        """Rejects new requests from now on; accepted ones are finished and their results can be fetched."""
        self.is_draining = True
        self.service.stop_accepting()

    def is_drained(self) -> bool:
        """Whether all requests have ended and their results were fetched, or the time to fetch them is over."""
        stats = self.service.stats()
        if not self.is_draining or stats.waiting or stats.in_progress:
            return False
        self._idle_since = self._idle_since or time.monotonic()
        unfetched = self.results.num_unfetched()
        is_late = time.monotonic() - self._idle_since > self.settings.grace_seconds
        if is_late and (unfetched or self.num_active):
            _log.warning("stopping with %d results not fetched and %d requests in flight", unfetched, self.num_active)
        return is_late or not (unfetched or self.num_active)

    def close(self) -> None:
        """Ends the service at once and deletes the stored files."""
        self.service.close(timeout=0)
        self.body_pool.shutdown(wait=False, cancel_futures=True)
        self.files.close()

    # -------------------------------------------------------------------------------------------------------- responses

    def status(self, job: Job, base_url: str, *, with_logs: bool) -> dict[str, Any]:
        """Builds fal's status JSON of a queue request.

        Args:
            job: The request.
            base_url: URL of this server as the client sees it.
            with_logs: Whether to include the log lines.
        """
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
        """Builds fal's JSON of a result. The URL of an image in the file store is made absolute.

        Args:
            job: A request that has ended.
            base_url: URL of this server as the client sees it.
            with_extra: Whether to add the field `extra`.

        Raises:
            RequestError: The request failed.
        """
        answer = job.future.result(0)
        body = dict(answer.body)
        image = body.get("image")
        if image and image["url"].startswith("/"):
            body["image"] = {**image, "url": base_url + image["url"]}
        return {**body, "extra": answer.extra} if with_extra else body

    def _publish(self, prediction: Prediction[Any], owner: str) -> Mapping[str, Any] | None:
        content = encode_png(prediction.draw())
        name = f"{prediction.task.slug}.png"
        width, height = prediction.source_image.size
        try:
            address = self.files.put(content, name, "image/png", owner)
        except RequestError:  # the disk is full, or the image larger than the store: the answer is worth more
            return None
        described: dict[str, Any] = to_dict(Image(address, "image/png", name, len(content), width, height))
        return described

    # ------------------------------------------------------------------------------------------------------------- keys

    def is_valid_key(self, given: str) -> bool:
        """Whether an API key is right; compares in constant time."""
        expected = self.settings.api_key
        return expected is None or secrets.compare_digest(given.encode(), expected.encode())

    def make_token(self) -> str:
        """Creates a token for uploads, valid for `TOKEN_SECONDS`. It is signed, so that nothing need be kept."""
        end = f"{int(time.monotonic() + TOKEN_SECONDS):x}"
        return f"{end}-{self._sign(end)}"

    def is_valid_token(self, given: str) -> bool:
        """Whether an upload token was created here and has not expired."""
        end, _, signature = given.partition("-")
        if not secrets.compare_digest(signature.encode(), self._sign(end).encode()):
            return False
        return int(end, 16) > time.monotonic()

    def _sign(self, end: str) -> str:
        return hmac.new(self._token_key, end.encode(), "sha256").hexdigest()
