"""Answers that others have published for known checkpoints and images, and how an answer is compared with them.

Boxes, polygons and labels are kept as they were published: numbers and single words. Of running text (captions, plain
OCR) only a digest and the number of words are kept, because the text is other people's; each row names where it is.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from florence_onnx import tasks
from florence_onnx.answers.locations import Region, Size, check_size
from florence_onnx.errors import FlorenceError, InputError
from florence_onnx.generation.options import GenerationOptions
from florence_onnx.tasks import Task

PUBLISHED_ANSWERS = Path(__file__).parent / "published_answers.jsonl"

Part = tuple[str, tuple[int, ...]]
"""A label, which may be empty, and the bins of the location tokens after it."""

_SPECIAL = re.compile(r"</?s>|<pad>")
_PART = re.compile(r"([^<]*)((?:<loc_\d+>)+)")
_BIN = re.compile(r"<loc_(\d+)>")
_MAX_SHOWN = 80
"""Characters of an answer in a message."""


@dataclass(frozen=True)
class PublishedAnswer:
    """One answer of one checkpoint about one image."""

    checkpoint: str
    """Hub id."""
    task: Task[Any]
    image: str
    """A name of `images.PUBLISHED_IMAGES`."""
    source: str
    """Where it was published."""
    revision: str | None = None
    """Revision of the checkpoint; None is the default branch."""
    text_input: str | None = None
    region: Region | None = None
    options: GenerationOptions = field(default_factory=GenerationOptions)
    parts: tuple[Part, ...] | None = None
    """The answer, where it has location tokens."""
    sha256: str | None = None
    """Of the answer, where it is running text: UTF-8, without special tokens and white space at its ends."""
    num_words: int = 0
    caveat: str | None = None
    """Why the checkpoint may answer otherwise today; None if nothing is known against the answer."""

    def compare(self, text: str) -> str | None:
        """Compares generated text with the answer.

        Args:
            text: The generated text with all its tokens.

        Returns:
            What differs, in a line; None if nothing does.
        """
        plain = strip_special(text)
        if self.parts is None:
            return None if digest(plain) == self.sha256 else self._describe_text(plain)
        return _describe_parts(self.parts, split(plain))

    def _describe_text(self, plain: str) -> str:
        return (
            f"{_shorten(plain)!r} ({len(plain.split())} words) is not the published text ({self.num_words} words), which "
            f"is at {self.source}"
        )


def strip_special(text: str) -> str:
    """Removes `<s>`, `</s>` and `<pad>`, and white space at the ends."""
    return _SPECIAL.sub("", text).strip()


def digest(plain: str) -> str:
    """SHA-256 of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(plain.encode()).hexdigest()


def split(plain: str) -> tuple[Part, ...]:
    """Splits text with location tokens into labels and bins; text after the last one is a part without bins."""
    found = [(label.strip(), tuple(map(int, _BIN.findall(bins)))) for label, bins in _PART.findall(plain)]
    rest = _PART.sub("", plain).strip()
    return (*found, (rest, ())) if rest else tuple(found)


def _describe_parts(expected: tuple[Part, ...], found: tuple[Part, ...]) -> str | None:
    different = [
        (index, theirs, ours)
        for index, (theirs, ours) in enumerate(zip_longest(expected, found), start=1)
        if theirs != ours
    ]
    if not different:
        return None
    index, theirs, ours = different[0]
    return (
        f"{len(different)} of {max(len(expected), len(found))} parts differ, the first is part {index}: "
        f"{_describe_part(ours)}, published {_describe_part(theirs)}"
    )


def _describe_part(part: Part | None) -> str:
    if part is None:
        return "nothing"
    label, bins = part
    return f"{label!r} at {_shorten(','.join(map(str, bins)))}"


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…"


# ------------------------------------------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class PublishedImage:
    """An image that answers were published about."""

    image: str
    """Its name in answers, and its file name in a folder of local images."""
    size: Size
    """`(width, height)` in pixels: another image under the address is found out by it."""
    repository: str | None = None
    """Data set on the hub."""
    path: str | None = None
    """Path in `repository`."""
    url: str | None = None
    """Address of an image that is on no hub."""
    sha256: str | None = None
    """Of the file; None where nobody has reported it yet."""


@dataclass(frozen=True)
class Published:
    """All that is known of published answers."""

    answers: tuple[PublishedAnswer, ...]
    images: Mapping[str, PublishedImage]
    """By name."""


def read_published(path: Path = PUBLISHED_ANSWERS) -> Published:
    """Reads a JSON lines file of published answers and images.

    A line with `task` has the fields of `PublishedAnswer`: `task` as a slug or token, `region` as four bins, `parts` as
    pairs, `options` by name; instead of `parts` or `sha256` it may have `text`, the generated text itself. Every other
    line has the fields of `PublishedImage`.

    Raises:
        InputError: The file cannot be read, or a line is neither; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the published answers of {path}: {error}") from error
    answers, images = [], {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "task" in row:
                answers.append(_read_answer(row))
            else:
                images[str(row["image"])] = PublishedImage(**{**row, "size": check_size(row["size"])})
        except (FlorenceError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, line {number}: {type(error).__name__}: {error}") from error
    unknown = {answer.image for answer in answers} - images.keys()
    if unknown:
        raise InputError(f"{path} has no line for the images {', '.join(sorted(unknown))}")
    return Published(tuple(answers), images)


def _read_answer(row: Mapping[str, Any]) -> PublishedAnswer:
    values = dict(row)
    values["task"] = tasks.get(values["task"])
    values["options"] = GenerationOptions(**values.get("options", {}))
    if values.get("region") is not None:
        values["region"] = Region(*values["region"])
    if "text" in values:
        values |= facts(values.pop("text"))
    if values.get("parts") is not None:
        values["parts"] = tuple((str(label), tuple(map(int, bins))) for label, bins in values["parts"])
    elif not values.get("sha256"):
        raise ValueError("an answer needs parts, sha256 or text")
    return PublishedAnswer(**values)


def facts(text: str) -> dict[str, Any]:
    """What is kept of a generated text: `parts`, or `sha256` and `num_words` where it has no location tokens."""
    plain = strip_special(text)
    if _BIN.search(plain):
        return {"parts": split(plain)}
    return {"sha256": digest(plain), "num_words": len(plain.split())}
