"""What `florence_onnx.json` may say: its digest, by which any damage shows, and the range of every number in it."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from florence_onnx.errors import BundleFormatError

DIGEST = "sha256"
"""Key of the digest. Descriptions of florence_onnx 0.1 have none."""
GRAYS = 255
"""Steps of a pixel's value. A deviation below one of them is no deviation of pixels."""

RANGES: Mapping[str, tuple[float, float]] = {
    "image_size": (1, 16_384),
    "image_mean": (0, 1),
    "image_std": (1 / GRAYS, 1),
    "decoder_layers": (1, 1024),
    "decoder_heads": (1, 1024),
    "head_dim": (1, 16_384),
    "max_positions": (1, 2**20),
    "vocab_size": (1, 2**24),
    "num_image_tokens": (1, 2**20),
    "pad_token_id": (0, 2**24 - 1),
}
"""Least and greatest value of each size of a model: far beyond Florence-2-large, and small enough that arrays of these
shapes have a size that numpy and ONNX Runtime can express. Other sizes are positive and below 2^31."""
_OTHER = (1, 2**31 - 1)
_MAX_BYTES = 2**53
_BYTES = f"from 0 to {_MAX_BYTES}"
_FILE_NAME = re.compile(r"[^/\\\0]{1,200}")


# -------------------------------------------------------------------------------------------------------------- digest


def digest(described: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, of a description without its own digest.

    It is that of canonical JSON (keys sorted, no blanks, ASCII), so that it does not depend on how the file is laid out.
    """
    content = {name: value for name, value in described.items() if name != DIGEST}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def sealed(described: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the digest of all else in it, as it is to be written."""
    content = {name: value for name, value in described.items() if name != DIGEST}
    return {**content, DIGEST: digest(content)}


def check_digest(described: Mapping[str, Any]) -> None:
    """Checks a description against its digest; one without a digest, of an older version, passes.

    Raises:
        BundleFormatError: It is not what was written.
    """
    if DIGEST in described and described[DIGEST] != digest(described):
        raise BundleFormatError(
            f"its content is not what was written: {DIGEST} should be {digest(described)}, is {shown(described[DIGEST])}"
        )


# -------------------------------------------------------------------------------------------------------------- ranges


def check_size(name: str, value: object) -> None:
    """Checks one of the sizes of a model: `RANGES` says what it may be.

    Raises:
        BundleFormatError: It is of another type, or out of range. The message has its name and the range.
    """
    count = {"image_size": 2, "image_mean": 3, "image_std": 3}.get(name)
    numbers = value if count and isinstance(value, tuple) else (value,)
    is_real = count == 3
    low, high = RANGES.get(name, _OTHER)
    if len(numbers) != (count or 1) or not all(_is_number(each, low, high, is_real=is_real) for each in numbers):
        kind = "numbers" if is_real else "whole numbers"
        what = f"{count} {kind}" if count else "a whole number"
        raise BundleFormatError(f"{name} must be {what} from {low:.6g} to {high:.6g}, got {shown(value)}")


def check_sizes_together(sizes: Mapping[str, Any]) -> None:
    """Checks the sizes that limit one another; each by itself must have been checked.

    Raises:
        BundleFormatError: The padding token is not in the vocabulary, or the image leaves no room for a prompt.
    """
    if sizes["pad_token_id"] >= sizes["vocab_size"]:
        raise BundleFormatError(
            f"pad_token_id must be from 0 to {sizes['vocab_size'] - 1} (vocab_size is {sizes['vocab_size']}), "
            f"got {sizes['pad_token_id']}"
        )
    if sizes["num_image_tokens"] >= sizes["max_positions"]:
        raise BundleFormatError(
            f"num_image_tokens must be below max_positions, which is {sizes['max_positions']}, "
            f"got {sizes['num_image_tokens']}"
        )


def check_name(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raises BundleFormatError for a value that is none of the allowed names."""
    if value not in allowed:
        raise BundleFormatError(f"{name} must be one of {', '.join(allowed)}, got {shown(value)}")


def as_object(name: str, value: object) -> dict[str, Any]:
    """The value; raises BundleFormatError where it is not a JSON object."""
    if not isinstance(value, dict):
        raise BundleFormatError(f"{name} must be an object, got {shown(value)}")
    return value


def check_file(name: object, facts: object) -> None:
    """Checks an entry of `files`: a name without a folder, a size in bytes, a hash.

    Raises:
        BundleFormatError: One of them is something else.
    """
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or name in (".", ".."):
        raise BundleFormatError(f"files must have names of files in the bundle, not {shown(name)}")
    stated = as_object(f"files.{name}", facts)
    if not _is_number(stated.get("size"), 0, _MAX_BYTES) or not isinstance(stated.get("sha256"), str):
        raise BundleFormatError(
            f"files.{name} must have a size from 0 to {_MAX_BYTES} and a sha256, got {shown(facts)}"
        )


def check_encoder(entry: object) -> dict[str, Any]:
    """Checks an entry of `image_sizes`, which describes the vision encoder for one image size.

    Returns:
        The entry.

    Raises:
        BundleFormatError: A value is missing, of another type, or out of range.
    """
    stated = as_object("image_sizes", entry)
    size, graph = stated.get("image_size"), stated.get("graph")
    check_size("image_size", tuple(size) if isinstance(size, list) else size)
    check_size("num_image_tokens", stated.get("num_image_tokens"))
    if not isinstance(graph, str) or not _FILE_NAME.fullmatch(graph):
        raise BundleFormatError(f"graph must be the name of a file in the bundle, got {shown(graph)}")
    check_memory(stated.get("memory"))
    return stated


def check_memory(memory: object) -> None:
    """Checks the bytes that `florence_onnx.bundles.memory` computes with; None and `{}` stand for none.

    Raises:
        BundleFormatError: One of them is missing or not a number of bytes.
    """
    if memory is None or memory == {}:
        return
    stated = as_object("memory", memory)
    weights, lengths = stated.get("weights"), stated.get("text_encoder")
    if not isinstance(weights, dict) or not _are_bytes(list(weights.values())):
        raise BundleFormatError(f"memory.weights must be bytes by graph, {_BYTES}, got {shown(weights)}")
    if not isinstance(lengths, list) or not lengths or not all(_are_bytes(each, count=2) for each in lengths):
        raise BundleFormatError(
            f"memory.text_encoder must be pairs of tokens and bytes, {_BYTES}, got {shown(lengths)}"
        )
    for name in ("picture", "token"):
        if not _are_bytes([stated.get(name)]):
            raise BundleFormatError(f"memory.{name} must be bytes, {_BYTES}, got {shown(stated.get(name))}")


def shown(value: object) -> str:
    """A value for a message, shortened: a number of 4,000 digits would fill the screen."""
    return reprlib.repr(value)


def _are_bytes(values: object, count: int | None = None) -> bool:
    is_list = isinstance(values, Sequence) and not isinstance(values, str) and count in (None, len(values))
    return is_list and all(_is_number(each, 0, _MAX_BYTES) for each in values)  # type: ignore[attr-defined]


def _is_number(value: object, low: float, high: float, *, is_real: bool = False) -> bool:
    """Whether a value is a finite number of the range, and whole unless it may be real."""
    kinds = (int, float) if is_real else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        return False
    return low <= value <= high and math.isfinite(value)
