"""What was sent and what came back: JSON lines, written to the disk before anything else happens.

Two kinds of line: `sent` before each request to fal, `finished` after each call of any target. A call to fal that was
cut off has the first only: it is counted, and asked again.
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

_PASSING = frozenset({401, 402, 403, 408, 409, 425, 429})
"""Client errors that may be gone the next time: the key, the account, the load."""
_MIN_SECRET = 8
"""Characters; shorter strings are no keys, and blotting them out would damage the answers."""


@dataclass(frozen=True)
class Finished:
    """One call and what became of it."""

    call: str
    """`Call.id`."""
    target: str
    """`Target.identity`."""
    task: str
    image: str
    status: int | None
    """HTTP status; None where no answer came."""
    seconds: float
    """From the call to the answer, seen by the caller."""
    is_cold: bool
    """Whether this target had not answered this process before."""
    when: str
    """End, UTC, ISO 8601."""
    answer: Any = None
    """The raw answer, but for an image inside it; see `without_image`."""
    error: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    """The answer's `x-fal-…` headers."""

    @property
    def is_final(self) -> bool:
        """Whether asking again would change nothing: answered, or refused for what was asked."""
        if self.error is None:
            return True
        return self.status is not None and 400 <= self.status < 500 and self.status not in _PASSING


def without_image(answer: Any) -> Any:
    """An answer whose annotated image, where it is a `data:` URI (ours; fal's is an address), is cut to its size.

    A journal would otherwise grow by an image a call. Everything else is returned as it is.
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
    """An append-only file of a comparison. Only one process at a time may have it open."""

    def __init__(self, path: Path, *, secrets: Sequence[str] = ()) -> None:
        """Opens or makes the file, and reads what it holds.

        Args:
            path: The file; its folder is made.
            secrets: Strings that are blotted out of every line.

        Raises:
            InputError: The file is damaged, cannot be written, or another process has it open.
        """
        self.path = path
        self.num_sent = 0
        """Requests to fal, over all processes, whatever became of them."""
        self.last_sent: datetime.datetime | None = None
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
        """The journal itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the file."""
        self._file.close()

    def find(self, call: Call, target: str) -> Finished | None:
        """The last outcome of a call at a target (its identity), or None."""
        return self._finished.get((call.id, target))

    def write_sent(self, call: Call, target: str, when: datetime.datetime) -> None:
        """Notes a request to fal; to be called before it is sent."""
        self._write({"kind": "sent", "call": call.id, "target": target, "when": _format(when)})
        self.num_sent += 1
        self.last_sent = when

    def write_finished(self, finished: Finished) -> None:
        """Notes the outcome of a call."""
        self._write({"kind": "finished", **dataclasses.asdict(finished)})
        self._finished[finished.call, finished.target] = finished

    def _write(self, line: dict[str, Any]) -> None:
        text = self.blot(json.dumps(line, ensure_ascii=False))
        try:
            self._file.write(text.encode("utf-8", "backslashreplace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write the journal {self.path}: {error.strerror}; nothing more is sent") from None

    def blot(self, text: str) -> str:
        """A text without the secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _read(self) -> None:
        self._file.seek(0)
        *lines, tail = self._file.read().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                self._take(line)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"line {number} of the journal {self.path} is damaged: {error}") from None
        if tail:
            self._mend(tail)

    def _mend(self, tail: bytes) -> None:
        """A last line without its end was cut off while it was written: nothing was sent after it."""
        try:
            self._take(tail)
            self._file.write(b"\n")
        except (ValueError, TypeError, KeyError):
            self._file.truncate(self._file.seek(0, os.SEEK_END) - len(tail))
        self._file.flush()

    def _take(self, line: bytes) -> None:
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
    """Two processes would each count only their own calls."""
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
