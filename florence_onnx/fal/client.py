"""`fal_client` without a network: the same names, arguments and return values, answered by a model in this process.

After `fal_client` 1.0.3. What has no meaning without a network (`hint`, `headers`) is accepted and ignored; `webhook_url` is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any

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
"""Seconds between two states that `subscribe` reports, as in `fal_client`."""
MAX_KEPT = 1000
"""Requests that can still be asked for by their id; the oldest are forgotten first."""

Arguments = dict[str, Any]


@dataclass(frozen=True)
class SyncRequestHandle:
    """A request that was submitted."""

    request_id: str
    _client: SyncClient = field(repr=False)

    def status(self, *, with_logs: bool = False) -> Status:
        """Where it stands."""
        return self._client._status(self.request_id, with_logs)

    def iter_events(self, *, with_logs: bool = False, interval: float = POLL_INTERVAL) -> Iterator[Status]:
        """Its state every `interval` seconds, and at once when it has ended, which is the last."""
        job = self._client._find(self.request_id)
        while True:
            status = self.status(with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            with contextlib.suppress(FutureTimeoutError, RequestError):
                job.future.result(interval)

    def get(self, *, interval: float = POLL_INTERVAL) -> Arguments:
        """Waits for the answer.

        Args:
            interval: For `fal_client`'s sake; the answer is returned as soon as it is there.

        Raises:
            FalClientHTTPError: It ended without one.
        """
        return _answer(self._client._find(self.request_id))

    def cancel(self) -> None:
        """Takes it back.

        Raises:
            FalClientHTTPError: It has ended already.
        """
        self._client._cancel(self.request_id)


@dataclass(frozen=True)
class AsyncRequestHandle:
    """The same for `async` code."""

    request_id: str
    _client: SyncClient = field(repr=False)

    async def status(self, *, with_logs: bool = False) -> Status:
        """Where it stands."""
        return self._client._status(self.request_id, with_logs)

    async def iter_events(self, *, with_logs: bool = False, interval: float = POLL_INTERVAL) -> AsyncIterator[Status]:
        """As `SyncRequestHandle.iter_events`."""
        job = self._client._find(self.request_id)
        while True:
            status = await self.status(with_logs=with_logs)
            yield status
            if isinstance(status, Completed):
                return
            await asyncio.wait([job.ended()], timeout=interval)

    async def get(self, *, interval: float = POLL_INTERVAL) -> Arguments:
        """As `SyncRequestHandle.get`."""
        job = self._client._find(self.request_id)
        await asyncio.wait([job.ended()])
        return _answer(job)

    async def cancel(self) -> None:
        """As `SyncRequestHandle.cancel`."""
        self._client._cancel(self.request_id)


class SyncClient:
    """Answers with a service that is made at the first request."""

    def __init__(self, make_service: Callable[[], Service]) -> None:
        """Args: make_service: Loads the model; called once."""
        self._make_service = make_service
        self._service: Service | None = None
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def service(self) -> Service:
        """The service, its model loaded."""
        with self._lock:
            if self._service is None:
                self._service = self._make_service()
            return self._service

    def close(self) -> None:
        """Finishes what was submitted and lets the model go; the next request loads it again."""
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
    ) -> Arguments:
        """Asks, and waits for the answer.

        Args:
            application: Endpoint id, such as `fal-ai/florence-2-large/object-detection`.
            arguments: As fal takes them: `image_url`, and `text_input` or `region` where the endpoint needs it.
            method: `"POST"`; nothing else is offered.
            path: Appended to the endpoint id.
            timeout: Seconds for everything.
            start_timeout: Seconds until the model begins.
            hint: Ignored.
            headers: Ignored.

        Returns:
            fal's JSON.

        Raises:
            FalClientHTTPError: The request was refused or failed; `status_code` and `message` are fal's.
            FalClientTimeoutError: `timeout` was reached.
        """
        if method.upper() != "POST":
            raise_as_http_error(RequestError(405, {"detail": "Method Not Allowed"}))
        job = self._submit(_join(application, path), arguments, start_timeout, "normal")
        try:
            return _answer(job, timeout)
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
        """Asks without waiting; errors as for `run`.

        Args:
            application: As for `run`.
            arguments: As for `run`; that they are wrong shows in the result.
            path: As for `run`.
            hint: Ignored.
            webhook_url: Not offered.
            priority: `"low"` waits until no other request does.
            headers: Ignored.
            start_timeout: Seconds until the model begins.
        """
        if webhook_url is not None:
            raise_as_http_error(problems.bad_request("webhooks are not offered: use subscribe, or result"))
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
    ) -> Arguments:
        """Asks, reports what becomes of it, and returns the answer; errors as for `run`.

        Args:
            application: As for `run`.
            arguments: As for `run`.
            path: As for `run`.
            hint: Ignored.
            with_logs: Whether the reported states have logs.
            interval: Seconds between two reports.
            on_enqueue: Called with the request id.
            on_queue_update: Called with each state, the last of which is `Completed`.
            priority: As for `submit`.
            headers: Ignored.
            start_timeout: Seconds until the model begins.
            client_timeout: Seconds for everything; then the request is taken back.
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
                return _answer(job)
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
        """Where a request stands."""
        return self._status(request_id, with_logs)

    def result(self, application: str, request_id: str) -> Arguments:
        """Waits for the answer of a request."""
        return _answer(self._find(request_id))

    def cancel(self, application: str, request_id: str) -> None:
        """Takes a request back."""
        self._cancel(request_id)

    # ---------------------------------------------------------------------------------------------------------- inside

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
    """The `async` twins of a `SyncClient`; both share its model and requests."""

    def __init__(self, client: SyncClient) -> None:
        self._client = client

    async def run(self, application: str, arguments: Mapping[str, Any], **options: Any) -> Arguments:
        """As `SyncClient.run`."""
        return await asyncio.to_thread(self._client.run, application, arguments, **options)

    async def submit(self, application: str, arguments: Mapping[str, Any], **options: Any) -> AsyncRequestHandle:
        """As `SyncClient.submit`."""
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
    ) -> Arguments:
        """As `SyncClient.subscribe`; the callbacks may be coroutine functions."""
        limit = _start_limit(start_timeout, client_timeout)
        options = {name: value for name, value in options.items() if name not in ("hint", "headers")}
        handle = await self.submit(application, arguments, start_timeout=limit, **options)

        async def follow() -> Arguments:
            await _call(on_enqueue, handle.request_id)
            async for status in handle.iter_events(with_logs=with_logs, interval=interval):
                await _call(on_queue_update, status)
            return await handle.get()

        try:
            return await asyncio.wait_for(follow(), client_timeout)
        except asyncio.TimeoutError:
            with contextlib.suppress(FalClientHTTPError):  # it has just ended
                await handle.cancel()
            raise FalClientTimeoutError(client_timeout or 0.0, handle.request_id) from None

    async def get_handle(self, application: str, request_id: str) -> AsyncRequestHandle:
        """The handle of an earlier request."""
        return AsyncRequestHandle(request_id, self._client)

    async def status(self, application: str, request_id: str, *, with_logs: bool = False) -> Status:
        """Where a request stands."""
        return await AsyncRequestHandle(request_id, self._client).status(with_logs=with_logs)

    async def result(self, application: str, request_id: str) -> Arguments:
        """Waits for the answer of a request."""
        return await AsyncRequestHandle(request_id, self._client).get()

    async def cancel(self, application: str, request_id: str) -> None:
        """Takes a request back."""
        await AsyncRequestHandle(request_id, self._client).cancel()


def _join(application: str, path: str) -> str:
    return f"{application}/{path.lstrip('/')}" if path else application


def _start_limit(start_timeout: float | None, client_timeout: float | None) -> float | None:
    if client_timeout is None or start_timeout is None:
        return client_timeout if start_timeout is None else start_timeout
    if start_timeout > client_timeout:
        warnings.warn(
            f"start_timeout ({start_timeout} s) is larger than client_timeout ({client_timeout} s): the request may be given "
            "up before it starts",
            UserWarning,
            stacklevel=3,
        )
    return start_timeout


async def _call(function: Callable[[Any], Awaitable[None] | None] | None, value: Any) -> None:
    if function is not None:
        result = function(value)
        if inspect.isawaitable(result):
            await result


def _answer(job: Job, timeout: float | None = None) -> Arguments:
    try:
        answer = job.future.result(timeout)
    except RequestError as problem:
        raise_as_http_error(problem)
    return dict(answer.body)
