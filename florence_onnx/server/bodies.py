"""Reads the JSON of untrusted clients: in steps that are short, with memory for little more than the body itself.

`json.loads` holds the interpreter's lock from beginning to end, and 40 MB of `[[],[],…` become a gigabyte of lists.
So long strings, in practice one `data:` URI, are taken out first, and what is left is small and has few values:

```text
{"image_url":"data:…", "text_input":"a car"} ─▶ {"image_url":"long-1", "text_input":"a car"} ─json.loads─▶ dict
                └─ unescaped slice by slice ──────────────────────────────────────────────────────────▶ its str
```
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from florence_onnx.fal.contract import TooLong

MAX_SMALL = 1 << 16
"""Bytes of a body up to which it is parsed as it is, in at most a few milliseconds."""
MAX_STRING = 1 << 19
"""Bytes of a string other than a `data:` URI: more than any prompt holds, even if every character is escaped as
`\\uXXXX`; see `Florence2.max_prompt_bytes`."""
MAX_REST = 1 << 20
"""Bytes of a body without its long strings."""
MAX_VALUES = 20_000
"""Values of a body: strings, and commas and brackets between them. A request has about ten."""
_SLICE = 1 << 18
"""Bytes that are read in one step."""
_MAX_BACKSLASHES = 1 << 16
"""Backslashes in a row."""
_DATA = b"data:"
_SPECIAL = bytes(range(32)) + b"\\"
"""What needs a JSON parser inside a string: escapes, and control characters, which are not allowed."""


class BodyError(ValueError):
    """A body that is not JSON, or that exceeds a limit."""


def parse(body: bytearray) -> Any:
    """Parses JSON in UTF-8.

    Args:
        body: The body. Emptied, so that its memory can be used for what it becomes.

    Returns:
        The value. In an object at the top, a string of more than `MAX_STRING` bytes is a `contract.TooLong`, unless it
        is a `data:` URI; elsewhere it is an arbitrary short string.

    Raises:
        BodyError: The body is not JSON, or exceeds a limit.
    """
    try:
        return json.loads(bytes(body)) if len(body) <= MAX_SMALL else _parse_large(body)
    except RecursionError:
        raise BodyError("The body is nested too deeply") from None
    except ValueError as error:
        raise error if isinstance(error, BodyError) else BodyError(f"The body is not JSON: {error}") from None


def _parse_large(body: bytearray) -> Any:
    rest, long = _take_out(body, f"long-{secrets.token_hex(8)}-")
    parsed = json.loads(rest)
    if isinstance(parsed, dict):
        parsed |= {key: _read_long(body, *long[each]) for key, each in parsed.items() if _is_key(each, long)}
    body.clear()
    return parsed


def _is_key(value: object, long: dict[str, tuple[int, int]]) -> bool:
    return isinstance(value, str) and value in long


def _take_out(body: bytearray, name: str) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Replaces long strings by short ones.

    Returns:
        The body with the replacements, and the begin and end of each long string, without its quotes, by its replacement.
    """
    parts: list[bytes] = []
    long: dict[str, tuple[int, int]] = {}
    position = num_bytes = 0
    for begin, end in _strings(body):
        # a data: URI that is short needs no special treatment
        if end - begin > MAX_STRING or (end - begin > MAX_SMALL and body.startswith(_DATA, begin)):
            replacement = f"{name}{len(long)}"
            long[replacement] = begin, end
            num_bytes += begin - position
            _check_rest(num_bytes)
            parts += [bytes(body[position:begin]), replacement.encode()]
            position = end
    _check_rest(num_bytes + len(body) - position)
    parts.append(bytes(body[position:]))
    return b"".join(parts), long


def _check_rest(num_bytes: int) -> None:
    if num_bytes > MAX_REST:
        raise BodyError(f"The body has more than {MAX_REST:,} bytes besides long strings such as data: URIs")


def _strings(body: bytearray) -> Iterator[tuple[int, int]]:
    """Begin and end of every string, without its quotes; raises BodyError where there are too many values."""
    num_values, position = 0, 0
    while (begin := body.find(b'"', position)) >= 0:
        num_values += 1 + _num_separators(body, position, begin, MAX_VALUES - num_values)
        end = body.find(b'"', begin + 1)
        while end >= 0 and _is_escaped(body, begin + 1, end):
            num_values += 1  # not a value, but a step of this loop
            _check_values(num_values)
            end = body.find(b'"', end + 1)
        if end < 0:
            raise BodyError(f"The body is not JSON: the string that begins at byte {begin:,} does not end")
        _check_values(num_values)
        yield begin + 1, end
        position = end + 1
    _check_values(num_values + _num_separators(body, position, len(body), MAX_VALUES - num_values))


def _check_values(num_values: int) -> None:
    if num_values > MAX_VALUES:
        raise BodyError(f"The body has more than {MAX_VALUES:,} values")


def _num_separators(body: bytearray, begin: int, end: int, enough: int) -> int:
    """Counts commas and opening brackets, and stops soon after there are more than `enough`."""
    found = 0
    for start in range(begin, end, _SLICE):
        found += sum(body.count(each, start, min(start + _SLICE, end)) for each in (b",", b"[", b"{"))
        if found > enough:
            break
    return found


def _is_escaped(body: bytearray, begin: int, position: int) -> bool:
    """Whether an odd number of backslashes stands before a position of the string that starts at `begin`."""
    if position == begin or body[position - 1] != ord("\\"):
        return False
    for num_bytes in (16, _MAX_BACKSLASHES):
        before = bytes(body[max(begin, position - num_bytes) : position])
        num_backslashes = len(before) - len(before.rstrip(b"\\"))
        if num_backslashes < num_bytes:
            return num_backslashes % 2 == 1
    raise BodyError(f"The body has {_MAX_BACKSLASHES:,} backslashes in a row")


def _read_long(body: bytearray, begin: int, end: int) -> str | TooLong:
    """A `data:` URI without its JSON escapes, which are replaced in the body itself; the length of another string."""
    if not body.startswith(_DATA, begin):
        return TooLong(end - begin)
    written = begin
    for part in _slices(body, begin, end):
        if part != part.translate(None, _SPECIAL):
            part = json.loads(f'"{part.decode("latin-1")}"').encode("latin-1", "replace")  # never longer
        body[written : written + len(part)] = part
        written += len(part)
    # a data: URI is ASCII; what is not gets no image out of it, but should take no more than a byte a character
    with memoryview(body) as view:
        return str(view[begin:written], "latin-1")


def _slices(body: bytearray, begin: int, end: int) -> Iterator[bytes]:
    """Slices of a string, none of which ends inside an escape; an escape has at most six characters."""
    while begin < end:
        stop = min(begin + _SLICE, end)
        backslash = body.rfind(b"\\", max(begin, stop - 6), stop) if stop < end else -1
        if backslash > begin and not _is_escaped(body, begin, backslash):
            stop = backslash
        yield bytes(body[begin:stop])
        begin = stop
