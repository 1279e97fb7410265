"""Checks of single generation options: each returns a value in the form that searches use, or raises `OptionsError`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from florence_onnx.errors import OptionsError

Check = Callable[[str, Any, int], Any]
"""Of an option's name, its value and the size of the vocabulary."""
Bias = tuple[tuple[int, ...], float]


def whole(name: str, value: object, low: int, high: int) -> int:
    """An integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise OptionsError(f"{name} must be a whole number from {low} to {high}, got {value!r}")
    return int(value)


def number(name: str, value: object, low: float, high: float, *, is_open: bool = False) -> float:
    """A number from `low` to `high`; above `low` where the interval is open."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if is_number and low <= float(value) <= high and not (is_open and float(value) == low):  # type: ignore[arg-type]
        return float(value)  # type: ignore[arg-type]
    bounds = f"above {low:g}, at most {high:g}" if is_open else f"from {low:g} to {high:g}"
    hint = "; for the likeliest token, set do_sample to False" if name == "temperature" and value == 0 else ""
    raise OptionsError(f"{name} must be a number {bounds}, got {value!r}{hint}")


def flag(name: str, value: object, vocab: int) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise OptionsError(f"{name} must be True or False, got {value!r}")
    return value


def forced_token(name: str, value: object, vocab: int) -> int | None:
    """A token; None for -1."""
    found = whole(name, value, -1, vocab - 1)
    return None if found < 0 else found


def forced_tokens(name: str, value: object, vocab: int) -> int | tuple[int, ...] | None:
    """A token or several; None for -1."""
    if _is_list(value):
        return one_or_several_tokens(name, value, vocab)
    return forced_token(name, value, vocab)


def one_or_several_tokens(name: str, value: object, vocab: int) -> int | tuple[int, ...]:
    """A token, or at least two different ones."""
    if not _is_list(value):
        return whole(name, value, 0, vocab - 1)
    found = tuple(dict.fromkeys(tokens(name, value, vocab)))
    if not found:
        raise OptionsError(f"{name} must be a token or a list of some, got an empty list")
    return found[0] if len(found) == 1 else found


def tokens(name: str, value: Any, vocab: int) -> tuple[int, ...]:
    """A list of tokens."""
    if not _is_list(value):
        raise OptionsError(f"{name} must be a list of token ids, got {value!r}")
    return tuple(whole(f"each token of {name}", token, 0, vocab - 1) for token in value)


def sequences(name: str, value: Any, vocab: int) -> tuple[tuple[int, ...], ...]:
    """A list of lists of tokens, none of which is empty."""
    if not _is_list(value) or not all(_is_list(each) and len(each) for each in value):
        raise OptionsError(f"{name} must be a list of lists of token ids, such as [[5], [6, 7]], got {value!r}")
    return tuple(tokens(name, each, vocab) for each in value)


def biases(name: str, value: Any, vocab: int) -> tuple[Bias, ...]:
    """Token sequences with a number each; of equal sequences the last one counts."""
    pairs = list(value.items()) if isinstance(value, Mapping) else value
    if not _is_list(pairs) or not all(_is_list(pair) and len(pair) == 2 for pair in pairs):
        raise OptionsError(f"{name} must be pairs of token ids and a number, such as [[[5, 7], -2.0]], got {value!r}")
    keys = sequences(name, [pair[0] for pair in pairs], vocab)
    return tuple({key: number(name, pair[1], -1e4, 1e4) for key, pair in zip(keys, pairs, strict=True)}.items())


def decay(name: str, value: Any, vocab: int) -> tuple[int, float]:
    """A number of tokens and a factor."""
    if not _is_list(value) or len(value) != 2:
        raise OptionsError(f"{name} must be a number of tokens and a factor, such as [20, 1.05], got {value!r}")
    return whole(f"the start of {name}", value[0], 0, 2**31), number(
        f"the factor of {name}", value[1], 0, 10, is_open=True
    )


def seed(name: str, value: object, greatest: int) -> int | None:
    """A seed; None for -1."""
    found = whole(name, value, -1, greatest)
    return None if found < 0 else found


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
