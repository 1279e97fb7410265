"""The journal of a comparison: JSON lines, each synced to disk before the next step.

There are two kinds of lines: `sent`, before each request to fal, and `finished`, after each call to any target. An
interrupted call to fal has a `sent` line only: it counts towards the limit and is repeated.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from florence_onnx.bench_fal.plan import Call
from florence_onnx.errors import InputError
from florence_onnx.images.url import is_data_uri

_RETRYABLE = frozenset({401, 402, 403, 408, 409, 425, 429})
"""Client errors that can go away: wrong key, no credit, timeout, rate limit."""
_MIN_SECRET = 8
"""Least characters of a secret that is redacted: shorter strings are not keys, and could occur in answers by chance."""


@dataclass(frozen=True)
class Finished:
    """A call that has ended, with its answer or error."""

    call: str
    """`Call.id`."""
    target: str
    """`Target.identity`."""
    task: str
    image: str
    status: int | None
    """HTTP status; None if there was no response."""
    seconds: float
    """Seconds from the call to its answer, as seen by the caller."""
    is_cold: bool
    """Whether no earlier call to the target has succeeded in this process."""
    when: str
    """Time of the end, in UTC and ISO 8601."""
    answer: Any = None
    """The raw answer, with an embedded image removed; see `without_image`."""
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """The `x-fal-…` headers of the response."""

    @property
    def is_final(self) -> bool:
        """Whether a repetition would change nothing: it succeeded, or its arguments were rejected."""
        if self.error is None:
            return True
        return self.status is not None and 400 <= self.status < 500 and self.status not in _RETRYABLE


def without_image(answer: Any) -> Any:
    """Replaces the annotated image of an answer by its size, if it is a `data:` URI (fal's is a URL).

    Otherwise every call would add an image to the journal. Everything else is returned unchanged.
    """
    image = answer.get("image") if isinstance(answer, dict) else None
    if not isinstance(image, dict):
        return answer
    address = image.get("url")
    if not isinstance(address, str) or not is_data_uri(address):
        return answer
    head = address.partition(",")[0]
    return {**answer, "image": {**image, "url": f"{head},… ({len(address)} characters)"}}


class Journal:
    """The append-only file of a comparison, locked by one process at a time."""

    def __init__(self, path: Path, *, secrets: Sequence[str] = ()) -> None:
        """Opens or creates the file and reads it.

        Args:
            path: The file; its folder is created.
            secrets: Strings that are redacted in every line.

        Raises:
            InputError: The file is damaged, cannot be written, or another process has it open.
        """
        self.path = path
        self.num_sent = 0
        """Requests sent to fal by all processes, successful or not."""
        self.last_sent: datetime.datetime | None = None
        """Time of the last request to fal, in UTC."""
        self._secrets = [
            json.dumps(secret, ensure_ascii=False)[1:-1] for secret in secrets if len(secret) >= _MIN_SECRET
        ]
        self._finished: dict[tuple[str, str], Finished] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise InputError(f"cannot write the journal {path}: {error.strerror}") from None
        try:
            _lock(self._file, path)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        """Returns the journal."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._file.close()

    def find(self, call: Call, target: str) -> Finished | None:
        """Returns the last attempt of a call at a target (its identity), or None."""
        return self._finished.get((call.id, target))

    def write_sent(self, call: Call, target: str, when: datetime.datetime) -> None:
        """Records a request to fal; must be called before it is sent."""
        self._write({"kind": "sent", "call": call.id, "target": target, "when": _format(when)})
        self.num_sent += 1
        self.last_sent = when

    def write_finished(self, finished: Finished) -> None:
        """Records a call that has ended."""
        self._write({"kind": "finished", **dataclasses.asdict(finished)})
        self._finished[finished.call, finished.target] = finished

    def _write(self, line: dict[str, Any]) -> None:
        text = self.redact(json.dumps(line, ensure_ascii=False))
        try:
            self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"cannot write the journal {self.path}: {error.strerror}; no more calls are sent"
            ) from None

    def redact(self, text: str) -> str:
        """Replaces the secrets in a text by `***`."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _read(self) -> None:
        self._file.seek(0)
        *lines, tail = self._file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                self._parse(line)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"line {number} of the journal {self.path} is damaged: {error}") from None
        if tail:
            self._repair(tail)

    def _repair(self, tail: bytes) -> None:
        """Completes or removes a last line without a line break: its writing was interrupted, so nothing was sent since."""
        try:
            self._parse(tail)
            self._file.write(b"\n")
        except (ValueError, TypeError, KeyError):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - len(tail))
        self._file.flush()

    def _parse(self, line: bytes) -> None:
        content = json.loads(line)
        kind = content.pop("kind")
        if kind == "finished":
            finished = Finished(**content)
            self._finished[finished.call, finished.target] = finished
        elif kind == "sent":
            self.last_sent = datetime.datetime.fromisoformat(content["when"])
            self.num_sent += 1
        else:
            raise ValueError(f"unknown kind {kind!r}")


def _format(when: datetime.datetime) -> str:
    return when.isoformat(timespec="microseconds")


def _lock(file: BinaryIO, path: Path) -> None:
    """Locks the file: two processes would each count only their own calls."""
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(
            f"another process is writing the journal {path}; wait for it, or choose another --out"
        ) from None
