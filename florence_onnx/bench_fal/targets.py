"""The targets of a comparison: fal, a server with its API, and this package in the same process."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import fal_client
import httpx

from florence_onnx import Florence2, fal
from florence_onnx.bench_fal.budget import Budget
from florence_onnx.bench_fal.plan import Call
from florence_onnx.bench_fal.transport import CallFailedError, SingleRequestTransport
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.fal.service import Service, ServiceSettings

FAL = "fal"
IN_PROCESS = "in-process"
FAL_URL = "https://fal.run/"
_USER_AGENT = f"fal-client/{fal_client.__version__} (python)"
_NO_KEY = (
    "target fal needs a key: create one at https://fal.ai/dashboard/keys and set it in the environment: export "
    "FAL_KEY=… (or FAL_KEY_ID and FAL_KEY_SECRET). To run without fal: --targets in-process,served=http://…"
)

Run = Callable[[str, dict[str, Any]], Any]
"""The function `fal_client.run`: endpoint id and arguments to an answer."""


@dataclass(frozen=True)
class Reply:
    """A raw answer."""

    answer: Any
    """The decoded JSON."""
    status: int | None = 200
    """HTTP status."""
    headers: dict[str, str] = field(default_factory=dict)
    """The `x-fal-…` headers."""


class Target(Protocol):
    """Answers calls, one at a time."""

    @property
    def name(self) -> str:
        """Name in messages and reports; unique in a comparison."""
        ...

    @property
    def identity(self) -> str:
        """Identifies its answers in the journal, so that another model or URL does not reuse them."""
        ...

    def prepare(self, call: Call) -> None:
        """Does everything before a call that must not be part of its time.

        Raises:
            BudgetSpentError: The limit on calls is reached.
        """
        ...

    def ask(self, call: Call) -> Reply:
        """Makes a call; this is timed.

        Raises:
            CallFailedError: The call failed.
        """
        ...


class ClientTarget:
    """fal or a server, called through an unmodified `fal_client.SyncClient` with our own transport."""

    def __init__(
        self,
        name: str,
        base_url: str,
        key: str,
        *,
        timeout: float,
        budget: Budget | None = None,
        trust_env: bool = False,
    ) -> None:
        """Opens no connection yet.

        Args:
            name: Name in messages and reports.
            base_url: URL that replaces `https://fal.run/`.
            key: API key; any string for a server that requires none.
            timeout: Seconds without a byte after which a call fails.
            budget: Limits the requests; None for a server of one's own.
            trust_env: See `SingleRequestTransport`.
        """
        self.name = name
        self.identity = name if base_url == FAL_URL else f"{name} {base_url}"
        self._budget = budget
        self._timeout = timeout
        self._transport = SingleRequestTransport(base_url, trust_env=trust_env)
        self._client = fal_client.SyncClient(key=key)
        headers = {"Authorization": f"Key {key}", "User-Agent": _USER_AGENT}
        # `_client` is a cached property: setting it keeps the client from creating its own
        vars(self._client)["_client"] = httpx.Client(transport=self._transport, headers=headers, timeout=timeout)

    def prepare(self, call: Call) -> None:
        """Waits until the budget admits the call, and permits one request."""
        if self._budget is not None:
            self._budget.admit(call, self.identity)
        self._transport.allow_one()

    def ask(self, call: Call) -> Reply:
        """Calls `fal_client.SyncClient.run`."""
        try:
            answer: Any = self._client.run(call.application, arguments=call.arguments, timeout=self._timeout)
        except CallFailedError:
            raise
        except ValueError as error:  # invalid JSON
            raise CallFailedError(f"the answer is not JSON: {error}", 200, self._transport.headers) from None
        except (fal_client.FalClientError, httpx.HTTPError) as error:
            raise CallFailedError(f"{type(error).__name__}: {error}") from None
        return Reply(answer, 200, self._transport.headers)


class InProcessTarget:
    """This package in the same process; the first call loads the model."""

    def __init__(self, model: str, *, device: str = "auto", precision: str | None = None) -> None:
        """Loads nothing yet.

        Args:
            model: As for `Florence2.from_pretrained`.
            device: As for `Florence2.from_pretrained`.
            precision: As for `Florence2.from_pretrained`.
        """
        self.name = IN_PROCESS
        self.identity = " ".join([IN_PROCESS, model, device, *([precision] if precision else [])])
        self._load: Callable[[], Run] = functools.partial(_load, model, device, precision)
        self._run: Run | None = None

    def prepare(self, call: Call) -> None:
        """Does nothing: loading the model is part of the first, cold call."""

    def ask(self, call: Call) -> Reply:
        """Runs the model, which the first call loads."""
        if self._run is None:
            self._run = self._load()
        try:
            return Reply(self._run(call.application, call.arguments))
        except fal.FalClientHTTPError as error:
            raise CallFailedError(str(error), error.status_code) from None
        except (FlorenceError, RuntimeError, MemoryError) as error:
            raise CallFailedError(f"{type(error).__name__}: {error}") from None


def _load(model: str, device: str, precision: str | None) -> Run:
    # with cached image features, only the first call for an image would include the vision encoder
    settings = ServiceSettings(feature_cache_bytes=0)
    service = Service(Florence2.from_pretrained(model, device=device, precision=precision), settings)
    return fal.SyncClient(lambda: service).run


@dataclass(frozen=True)
class TargetChoice:
    """An entry of `--targets`."""

    name: str
    url: str | None = None
    """Base URL of a server; None for `fal` and `in-process`."""


def parse_targets(text: str) -> list[TargetChoice]:
    """Parses the value of `--targets`, such as `in-process,served=http://127.0.0.1:8000,fal`.

    Raises:
        InputError: A name is unknown or given twice, or a URL is not an http(s) URL.
    """
    chosen = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, base_url = entry.partition("=")
        if not equals and name in (FAL, IN_PROCESS):
            chosen.append(TargetChoice(name))
        elif equals and name not in (FAL, IN_PROCESS, "") and base_url.startswith(("http://", "https://")):
            chosen.append(TargetChoice(name, base_url))
        else:
            raise InputError(f"a target is {FAL}, {IN_PROCESS} or NAME=http://HOST:PORT, got {entry!r}")
    names = [each.name for each in chosen]
    if not names or len(set(names)) < len(names):
        raise InputError(f"there must be at least one target, and all names must differ; got {text!r}")
    return chosen


def find_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns fal's key from the variables that `fal_client` reads; None if they are not set."""
    key = environment.get("FAL_KEY", "").strip()
    if key:
        return key
    pair = [environment.get(name, "").strip() for name in ("FAL_KEY_ID", "FAL_KEY_SECRET")]
    return ":".join(pair) if all(pair) else None


def require_key(environment: Mapping[str, str] = os.environ) -> str:
    """Returns fal's key.

    Raises:
        InputError: There is none, or it contains characters that no key has.
    """
    key = find_key(environment)
    if key is None:
        raise InputError(_NO_KEY)
    # httpx cannot send such a key, and would show it in its error message
    if not key.isascii() or not key.isprintable() or " " in key:
        raise InputError("FAL_KEY contains white space or non-ASCII characters: copy the key again")
    return key


def find_server_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """Returns the key for our own server, from the variable that `florence-onnx serve` reads; None if it is not set."""
    return environment.get("FLORENCE_ONNX_API_KEY", "").strip() or None


def secrets_of(key: str | None) -> Sequence[str]:
    """Returns the strings that must not appear in any output: the key, and its parts `id` and `secret`."""
    return [] if key is None else [key, *key.split(":")]
