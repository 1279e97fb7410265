"""Who is asked: fal, a server that speaks its API, and this package in the same process."""

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
    "target fal needs a key: make one at https://fal.ai/dashboard/keys and put it into the environment, export "
    "FAL_KEY=… (or FAL_KEY_ID and FAL_KEY_SECRET). Without one, leave fal out: --targets in-process,served=http://…"
)


Run = Callable[[str, dict[str, Any]], Any]
"""fal's `run`: application and arguments to an answer."""


@dataclass(frozen=True)
class Reply:
    """A raw answer."""

    answer: Any
    """JSON as Python has it."""
    status: int | None = 200
    """HTTP status."""
    headers: dict[str, str] = field(default_factory=dict)
    """The `x-fal-…` headers."""


class Target(Protocol):
    """One that answers calls, one at a time."""

    @property
    def name(self) -> str:
        """For people; unique in a comparison."""
        ...

    @property
    def identity(self) -> str:
        """Tells its answers in the journal from those of another model or address."""
        ...

    def prepare(self, call: Call) -> None:
        """Everything before a call that is not in its time.

        Raises:
            BudgetSpentError: The call must not be made.
        """
        ...

    def ask(self, call: Call) -> Reply:
        """Answers; this is timed.

        Raises:
            CallFailedError: There is no answer.
        """
        ...


class ClientTarget:
    """fal or a server, asked by an unmodified `fal_client.SyncClient` over a transport of our own."""

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
            name: For people.
            base_url: Where requests go, in place of `https://fal.run/`.
            key: fal's key, or any for a server that asks for none.
            timeout: Seconds without a byte until a call is given up.
            budget: Admits each request; None for a server of one's own.
            trust_env: As for `SingleRequestTransport`.
        """
        self.name = name
        self.identity = name if base_url == FAL_URL else f"{name} {base_url}"
        self._budget = budget
        self._timeout = timeout
        self._transport = SingleRequestTransport(base_url, trust_env=trust_env)
        self._client = fal_client.SyncClient(key=key)
        headers = {"Authorization": f"Key {key}", "User-Agent": _USER_AGENT}
        # the client builds its own where this is not set; the rest of it stays as it is
        vars(self._client)["_client"] = httpx.Client(transport=self._transport, headers=headers, timeout=timeout)

    def prepare(self, call: Call) -> None:
        """Has the budget admit the call, and permits one request."""
        if self._budget is not None:
            self._budget.admit(call, self.identity)
        self._transport.allow_one()

    def ask(self, call: Call) -> Reply:
        """`fal_client.run`."""
        try:
            answer: Any = self._client.run(call.application, arguments=call.arguments, timeout=self._timeout)
        except CallFailedError:
            raise
        except ValueError as error:  # no JSON
            raise CallFailedError(f"the answer is not JSON: {error}", 200, self._transport.headers) from None
        except (fal_client.FalClientError, httpx.HTTPError) as error:
            raise CallFailedError(f"{type(error).__name__}: {error}") from None
        return Reply(answer, 200, self._transport.headers)


class InProcessTarget:
    """This package, without a server; the model is loaded by the first call."""

    def __init__(self, model: str, *, device: str = "auto", precision: str | None = None) -> None:
        """Loads nothing yet; arguments as for `Florence2.from_pretrained`."""
        self.name = IN_PROCESS
        self.identity = " ".join([IN_PROCESS, model, device, *([precision] if precision else [])])
        self._load: Callable[[], Run] = functools.partial(_load, model, device, precision)
        self._run: Run | None = None

    def prepare(self, call: Call) -> None:
        """Nothing: the model's loading is part of the cold time."""

    def ask(self, call: Call) -> Reply:
        """The answer of the model, loaded first where it is not."""
        if self._run is None:
            self._run = self._load()
        try:
            return Reply(self._run(call.application, call.arguments))
        except fal.FalClientHTTPError as error:
            raise CallFailedError(str(error), error.status_code) from None
        except (FlorenceError, RuntimeError, MemoryError) as error:
            raise CallFailedError(f"{type(error).__name__}: {error}") from None


def _load(model: str, device: str, precision: str | None) -> Run:
    # features kept from one question to the next would leave the vision encoder out of all times but the first
    settings = ServiceSettings(feature_cache_bytes=0)
    service = Service(Florence2.from_pretrained(model, device=device, precision=precision), settings)
    return fal.SyncClient(lambda: service).run


@dataclass(frozen=True)
class Chosen:
    """A target that was asked for."""

    name: str
    url: str | None = None
    """Base URL of a server; None for fal and in process."""


def parse_targets(text: str) -> list[Chosen]:
    """Reads `in-process,served=http://127.0.0.1:8000,fal`; any name before a URL will do.

    Raises:
        InputError: A name is unknown or given twice, or a URL is none.
    """
    chosen = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, equals, base_url = entry.partition("=")
        if not equals and name in (FAL, IN_PROCESS):
            chosen.append(Chosen(name))
        elif equals and name not in (FAL, IN_PROCESS, "") and base_url.startswith(("http://", "https://")):
            chosen.append(Chosen(name, base_url))
        else:
            raise InputError(f"a target is {FAL}, {IN_PROCESS} or NAME=http://HOST:PORT, got {entry!r}")
    names = [each.name for each in chosen]
    if not names or len(set(names)) < len(names):
        raise InputError(f"targets must be at least one, each with a name of its own, got {text!r}")
    return chosen


def find_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """fal's key, as `fal_client` reads it from the environment; None where there is none."""
    key = environment.get("FAL_KEY", "").strip()
    if key:
        return key
    pair = [environment.get(name, "").strip() for name in ("FAL_KEY_ID", "FAL_KEY_SECRET")]
    return ":".join(pair) if all(pair) else None


def require_key(environment: Mapping[str, str] = os.environ) -> str:
    """fal's key.

    Raises:
        InputError: There is none; the message says how to get on.
    """
    key = find_key(environment)
    if key is None:
        raise InputError(_NO_KEY)
    if not key.isascii() or not key.isprintable() or " " in key:  # httpx would show it in its error
        raise InputError("FAL_KEY holds white space or characters outside ASCII: copy the key anew")
    return key


def find_own_key(environment: Mapping[str, str] = os.environ) -> str | None:
    """The key of our own server, from the variable that `florence-onnx serve` reads; None where there is none."""
    return environment.get("FLORENCE_ONNX_API_KEY", "").strip() or None


def split_key(key: str | None) -> Sequence[str]:
    """All strings that must not be written anywhere."""
    return [] if key is None else [key, *key.split(":")]
