"""`fal_client` 1.0.3 without a network: the same names, arguments and return values, served by a model in this process.

Arguments that mean nothing without a network (`hint`, `headers`) are accepted and ignored; `webhook_url` is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

from florence_onnx import forks
from florence_onnx.fal import problems
from florence_onnx.fal.jobs import Job, Priority
from florence_onnx.fal.problems import RequestError
from florence_onnx.fal.service import Service
from florence_onnx.fal.states import (
    Completed,
    FalClientHTTPError,
    FalClientTimeoutError,
    InProgress,
    Queued,
    Status,
    raise_as_http_error,
)

POLL_INTERVAL = 0.1
"""Seconds between two status reports of `subscribe`; the default of `fal_client`."""
MAX_KEPT = 1000
"""Requests that can be looked up by their id; the oldest are dropped first."""

AnyJSON = dict[str, Any]
"""fal's JSON of a result; the name that `fal_client` has for it."""


@dataclass(frozen=True)
class SyncRequestHandle:
    """A submitted request."""

    request_id: str
    _client: SyncClient = field(repr=False)

    def status(self, *, with_logs: bool = False) -> Status:
        """The current status."""
        return self._client._status(self.request_id, with_logs)

    def iter_events(self, *, with_logs: bool = False, interval: float = POLL_INTERVAL) -> Iterator[Status]:
        """Yields the status every `interval` seconds; `Completed` comes without delay and is the last."""
        job = self._client._find(self.request_id)
        while True:
            status = self.status(with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            with contextlib.suppress(FutureTimeoutError, RequestError):
                job.future.result(interval)

    def get(self, *, interval: float = POLL_INTERVAL) -> AnyJSON:
        """Waits for the result.

        Args:
            interval: Ignored, present for compatibility with `fal_client`: there is no polling.

        Returns:
            fal's JSON.

        Raises:
            FalClientHTTPError: The request failed or was cancelled.
        """
        return _result(self._client._find(self.request_id))

    def cancel(self) -> None:
        """Cancels the request.

        Raises:
            FalClientHTTPError: 400, the request has already ended.
        """
        self._client._cancel(self.request_id)


@dataclass(frozen=True)
class AsyncRequestHandle:
    """A submitted request, for `async` code."""

    request_id: str
    _client: SyncClient = field(repr=False)

    async def status(self, *, with_logs: bool = False) -> Status:
        """The current status."""
        return self._client._status(self.request_id, with_logs)

    async def iter_events(self, *, with_logs: bool = False, interval: float = POLL_INTERVAL) -> AsyncIterator[Status]:
        """Async variant of `SyncRequestHandle.iter_events`."""
        job = self._client._find(self.request_id)
        while True:
            status = await self.status(with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            await asyncio.wait([job.ended()], timeout=interval)

    async def get(self, *, interval: float = POLL_INTERVAL) -> AnyJSON:
        """Async variant of `SyncRequestHandle.get`."""
        job = self._client._find(self.request_id)
        await asyncio.wait([job.ended()])
        return _result(job)

    async def cancel(self) -> None:
        """Async variant of `SyncRequestHandle.cancel`."""
        self._client._cancel(self.request_id)


class SyncClient:
    """The interface of `fal_client.SyncClient`, on a `Service` that the first request creates."""

    def __init__(self, make_service: Callable[[], Service]) -> None:
        """Loads nothing yet.

        Args:
            make_service: Loads the model and returns its service; called by the first request, and by the first one
                after `close`.
        """
        self._make_service = make_service
        self._service: Service | None = None
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = forks.Lock()

    @property
    def service(self) -> Service:
        """The service; creates it, which loads the model, if there is none."""
        with self._lock:
            if self._service is None:
                self._service = self._make_service()
            return self._service

    def close(self) -> None:
        """Finishes all submitted requests and releases the model; the next request loads it again."""
        with self._lock:
            service, self._service = self._service, None
        if service is not None:
            service.close()

    def run(
        self,
        application: str,
        arguments: Mapping[str, Any],
        *,
        method: str = "POST",
        path: str = "",
        timeout: float | None = None,
        start_timeout: float | None = None,
        hint: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> AnyJSON:
        """Runs a request and waits for its result.

        Args:
            application: Endpoint id, such as `fal-ai/florence-2-large/object-detection`.
            arguments: fal's arguments: `image_url`, and `text_input` or `region` where the endpoint needs it.
            method: `"POST"`, the only method there is.
            path: Appended to the endpoint id.
            timeout: Seconds for the whole request.
            start_timeout: Seconds that the request may wait before the model starts on it.
            hint: Ignored.
            headers: Ignored.

        Returns:
            fal's JSON.

        Raises:
            FalClientHTTPError: The request was rejected or failed; `status_code` and `message` are fal's.
            FalClientTimeoutError: The result took longer than `timeout`; the request was cancelled.
        """
        if method.upper() != "POST":
            raise_as_http_error(RequestError(405, {"detail": "Method Not Allowed"}))
        job = self._submit(_join(application, path), arguments, start_timeout, "normal")
        try:
            return _result(job, timeout)
        except FutureTimeoutError:
            self.service.cancel(job)
            raise FalClientTimeoutError(timeout or 0.0, job.id) from None

    def submit(
        self,
        application: str,
        arguments: Mapping[str, Any],
        *,
        path: str = "",
        hint: str | None = None,
        webhook_url: str | None = None,
        priority: Priority | None = None,
        headers: Mapping[str, str] | None = None,
        start_timeout: float | None = None,
    ) -> SyncRequestHandle:
        """Submits a request without waiting for its result.

        Args:
            application: As for `run`.
            arguments: As for `run`. Invalid arguments are reported by the result, not by this call.
            path: As for `run`.
            hint: Ignored.
            webhook_url: Not supported.
            priority: A `"low"` request waits until no normal one does.
            headers: Ignored.
            start_timeout: As for `run`.

        Returns:
            The handle of the request.

        Raises:
            FalClientHTTPError: There is no such endpoint, the queue is full, or a webhook was asked for.
        """
        if webhook_url is not None:
            raise_as_http_error(problems.bad_request("webhooks are not supported: use subscribe, or submit and result"))
        job = self._submit(_join(application, path), arguments, start_timeout, priority or "normal")
        return SyncRequestHandle(job.id, self)

    def subscribe(
        self,
        application: str,
        arguments: Mapping[str, Any],
        *,
        path: str = "",
        hint: str | None = None,
        with_logs: bool = False,
        interval: float = POLL_INTERVAL,
        on_enqueue: Callable[[str], None] | None = None,
        on_queue_update: Callable[[Status], None] | None = None,
        priority: Priority | None = None,
        headers: Mapping[str, str] | None = None,
        start_timeout: float | None = None,
        client_timeout: float | None = None,
    ) -> AnyJSON:
        """Submits a request, reports its progress and returns its result; errors as for `run`.

        Args:
            application: As for `run`.
            arguments: As for `run`.
            path: As for `run`.
            hint: Ignored.
            with_logs: Whether the reported statuses include logs.
            interval: Seconds between two reports.
            on_enqueue: Called with the request id.
            on_queue_update: Called with each status; the last one is `Completed`.
            priority: As for `submit`.
            headers: Ignored.
            start_timeout: As for `run`.
            client_timeout: Seconds for the whole request, which is cancelled after them.

        Returns:
            fal's JSON.
        """
        limit = _start_limit(start_timeout, client_timeout)
        deadline = None if client_timeout is None else time.monotonic() + client_timeout
        handle = self.submit(application, arguments, path=path, priority=priority, start_timeout=limit)
        if on_enqueue is not None:
            on_enqueue(handle.request_id)
        job = self._find(handle.request_id)
        while True:
            status = handle.status(with_logs=with_logs)
            if on_queue_update is not None:
                on_queue_update(status)
            if isinstance(status, Completed):
                with _own_limit(start_timeout, client_timeout, job.id):
                    return _result(job)
            left = interval if deadline is None else min(interval, deadline - time.monotonic())
            if left <= 0:
                self.service.cancel(job)
                raise FalClientTimeoutError(client_timeout or 0.0, job.id)
            with contextlib.suppress(FutureTimeoutError, RequestError):
                job.future.result(left)

    def get_handle(self, application: str, request_id: str) -> SyncRequestHandle:
        """The handle of an earlier request."""
        return SyncRequestHandle(request_id, self)

    def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        """The current status of a request."""
        return self._status(request_id, with_logs)

    def result(self, application: str, request_id: str) -> AnyJSON:
        """Waits for the result of a request; errors as for `run`."""
        return _result(self._find(request_id))

    def cancel(self, application: str, request_id: str) -> None:
        """Cancels a request; errors as for `SyncRequestHandle.cancel`."""
        self._cancel(request_id)

    # -------------------------------------------------------------------------------------------------------- internals

    def _submit(self, application: str, arguments: object, start_timeout: float | None, priority: Priority) -> Job:
        try:
            job = self.service.submit(application, arguments, start_timeout=start_timeout, priority=priority)
        except RequestError as problem:
            raise_as_http_error(problem)
        with self._lock:
            self._jobs[job.id] = job
            while len(self._jobs) > MAX_KEPT:
                self._jobs.popitem(last=False)
        return job

    def _find(self, request_id: str) -> Job:
        with self._lock:
            job = self._jobs.get(request_id)
        if job is None:
            raise_as_http_error(problems.unknown_request(request_id))
        return job

    def _status(self, request_id: str, with_logs: bool) -> Status:
        job = self._find(request_id)
        state, logs = job.state, list(job.logs) if with_logs else None
        if state == "IN_QUEUE":
            return Queued(self.service.position(job))
        if state == "IN_PROGRESS":
            return InProgress(logs)
        problem = job.problem
        error = None if problem is None else str(problem)
        return Completed(logs, job.metrics, error, None if problem is None else problem.body.get("error_type"))

    def _cancel(self, request_id: str) -> None:
        if not self.service.cancel(self._find(request_id)):
            raise_as_http_error(problems.already_completed())


class AsyncClient:
    """The interface of `fal_client.AsyncClient`; shares the model and the requests of a `SyncClient`."""

    def __init__(self, client: SyncClient) -> None:
        self._client = client

    async def run(self, application: str, arguments: Mapping[str, Any], **options: Any) -> AnyJSON:
        """Async variant of `SyncClient.run`."""
        return await asyncio.to_thread(self._client.run, application, arguments, **options)

    async def submit(self, application: str, arguments: Mapping[str, Any], **options: Any) -> AsyncRequestHandle:
        """Async variant of `SyncClient.submit`."""
        handle = await asyncio.to_thread(self._client.submit, application, arguments, **options)
        return AsyncRequestHandle(handle.request_id, self._client)

    async def subscribe(
        self,
        application: str,
        arguments: Mapping[str, Any],
        *,
        with_logs: bool = False,
        interval: float = POLL_INTERVAL,
        on_enqueue: Callable[[str], Awaitable[None] | None] | None = None,
        on_queue_update: Callable[[Status], Awaitable[None] | None] | None = None,
        start_timeout: float | None = None,
        client_timeout: float | None = None,
        **options: Any,
    ) -> AnyJSON:
        """Async variant of `SyncClient.subscribe`; the callbacks may be coroutine functions."""
        limit = _start_limit(start_timeout, client_timeout)
        options = {name: value for name, value in options.items() if name not in ("hint", "headers")}
        handle = await self.submit(application, arguments, start_timeout=limit, **options)

        async def follow() -> AnyJSON:
            await _call(on_enqueue, handle.request_id)
            async for status in handle.iter_events(with_logs=with_logs, interval=interval):
                await _call(on_queue_update, status)
            return await handle.get()

        try:
            with _own_limit(start_timeout, client_timeout, handle.request_id):
                return await asyncio.wait_for(follow(), client_timeout)
        except asyncio.TimeoutError:
            with contextlib.suppress(FalClientHTTPError):  # it ended in this very moment
                await handle.cancel()
            raise FalClientTimeoutError(client_timeout or 0.0, handle.request_id) from None

    async def get_handle(self, application: str, request_id: str) -> AsyncRequestHandle:
        """The handle of an earlier request."""
        return AsyncRequestHandle(request_id, self._client)

    async def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        """The current status of a request."""
        return await AsyncRequestHandle(request_id, self._client).status(with_logs=with_logs)

    async def result(self, application: str, request_id: str) -> AnyJSON:
        """Waits for the result of a request; errors as for `run`."""
        return await AsyncRequestHandle(request_id, self._client).get()

    async def cancel(self, application: str, request_id: str) -> None:
        """Cancels a request; errors as for `SyncRequestHandle.cancel`."""
        await AsyncRequestHandle(request_id, self._client).cancel()


def _join(application: str, path: str) -> str:
    return f"{application}/{path.lstrip('/')}" if path else application


@contextlib.contextmanager
def _own_limit(start_timeout: float | None, client_timeout: float | None, request_id: str) -> Iterator[None]:
    """Turns the end of a wait that only `client_timeout` has limited into a FalClientTimeoutError.

    Service and client both watch that limit, and either may notice first that it has passed.
    """
    try:
        yield
    except FalClientHTTPError as error:
        if client_timeout is None or start_timeout is not None or error.status_code != 504:
            raise
        raise FalClientTimeoutError(client_timeout, request_id) from None


def _start_limit(start_timeout: float | None, client_timeout: float | None) -> float | None:
    if client_timeout is None or start_timeout is None:
        return client_timeout if start_timeout is None else start_timeout
    if start_timeout > client_timeout:
        warnings.warn(
            f"start_timeout ({start_timeout} s) is larger than client_timeout ({client_timeout} s): the request may be "
            "cancelled before it starts",
            UserWarning,
            stacklevel=3,
        )
    return start_timeout


async def _call(function: Callable[[Any], Awaitable[None] | None] | None, value: Any) -> None:
    if function is not None:
        result = function(value)
        if inspect.isawaitable(result):
            await result


def _result(job: Job, timeout: float | None = None) -> AnyJSON:
    try:
        answer = job.future.result(timeout)
    except RequestError as problem:
        raise_as_http_error(problem)
    return dict(answer.body)
