"""Which tokens may follow a partial answer, where the option `constrain` limits them.

A `Constraint` is a function of the tokens so far, kept as a state that each token extends, so that beams can carry theirs
along. There are two: `PrefixFunction` calls a function of the user's, as transformers' `prefix_allowed_tokens_fn`;
`automaton.Automaton` follows a graph. Both apply where transformers applies `prefix_allowed_tokens_fn`: after the processors
that ban, before those that force. Where bans leave none of the tokens that are allowed, the bans give way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.errors import OptionsError

Ids = npt.NDArray[np.int64]
_KEPT = 256
"""Answers of a user's function that are kept."""
AllowedTokens = Callable[[list[int]], Iterable[int]]
"""Of the tokens so far, from the decoder start token on: the ids of which one must follow."""


class Constraint(Protocol):
    """What a search asks before it chooses a token. States are opaque and immutable."""

    def start(self, tokens: Sequence[int]) -> Any:
        """The state after the tokens that are known before the first decoder call."""

    def extend(self, state: Any, token: int) -> Any:
        """The state after one more token, also after one that was not allowed."""

    def allowed(self, state: Any, room: int | None) -> Ids:
        """The tokens that may follow.

        Args:
            state: Of the answer so far.
            room: How many tokens may still follow, the end token included; None for any number.

        Returns:
            `(n,)`, at least one, increasing.
        """


class PrefixFunction:
    """A function of the user's."""

    def __init__(self, function: AllowedTokens, vocab_size: int) -> None:
        """Args:
        function: See `AllowedTokens`.
        vocab_size: V; its ids are checked against it.
        """
        self._function = function
        self._vocab_size = vocab_size
        # a search asks several times about the same prefix
        self._found = functools.lru_cache(maxsize=_KEPT)(self._call)

    def start(self, tokens: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokens)

    def extend(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def allowed(self, state: tuple[int, ...], room: int | None) -> Ids:
        return self._found(state)

    def _call(self, state: tuple[int, ...]) -> Ids:
        """Args: state, the tokens.

        Raises:
            OptionsError: The function failed, or returned no tokens or anything else than token ids.
        """
        try:
            found = np.unique(np.array(list(self._function(list(state)))))
        except Exception as error:  # whatever a user's function may raise
            raise OptionsError(f"the function given as constrain failed: {type(error).__name__}: {error}") from error
        if not found.size:
            raise OptionsError(
                f"the function given as constrain allows nothing after {list(state)}: return at least one token, such as the "
                "end token"
            )
        if found.dtype.kind not in "iu" or found[0] < 0 or found[-1] >= self._vocab_size:
            raise OptionsError(
                f"the function given as constrain must return token ids from 0 to {self._vocab_size - 1}, got {found.tolist()!r:.200}"
            )
        return found.astype(np.int64)


def contains(ids: Ids, token: int) -> bool:
    """Whether a token is among increasing ids."""
    place = int(np.searchsorted(ids, token))
    return place < len(ids) and int(ids[place]) == token


def without(ids: Ids, banned: Sequence[int]) -> Ids:
    """Allowed ids without banned ones; all of them where none would be left."""
    if not banned:
        return ids
    left = ids[~np.isin(ids, banned)]
    return left if len(left) else ids


class ConstrainedRow:
    """The constraint of one answer while it grows token by token."""

    def __init__(self, constraint: Constraint, tokens: Sequence[int], max_length: int) -> None:
        """Args:
        constraint: What limits the answer.
        tokens: Those known before the first decoder call.
        max_length: Most tokens of the answer, decoder start token included.
        """
        self._constraint = constraint
        self._state = constraint.start(tokens)
        self._room = max_length - len(tokens)

    def append(self, token: int) -> None:
        """Takes note of the answer's next token."""
        self._state = self._constraint.extend(self._state, token)
        self._room -= 1

    def allowed(self, banned: Sequence[int] = ()) -> Ids:
        """The tokens that may follow, without banned ones as far as possible."""
        return without(self._constraint.allowed(self._state, self._room), banned)

    def allowed_without_limit(self) -> Ids:
        """The tokens that might follow if there were no token limit."""
        return self._constraint.allowed(self._state, None)

    def possible(self, draft: Sequence[int]) -> list[int]:
        """The beginning of a draft that the constraint allows."""
        state, room = self._state, self._room
        found: list[int] = []
        for token in draft:
            if not contains(self._constraint.allowed(state, room), token):
                break
            state, room = self._constraint.extend(state, token), room - 1
            found.append(token)
        return found
