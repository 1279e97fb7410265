"""Prompt lookup: guessing the next tokens of an answer from what the prompt was given and from the answer so far.

A grounding answer repeats the caption's phrases, an answer about a region its four bins. A guess costs nothing when it
is not made and little when it is wrong: the decoder reads its weights once, for one token or for five.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_CONTEXT = 3
"""Longest run of tokens that is compared; where several places match, the longest run decides."""

MIN_CONTEXT_IN_ANSWER = 2
"""Behind a single token the answer hardly ever goes on as it did before: "red star", then "red circle". (Measured: of 62
such drafts on the demo model, 57 were wrong.)"""

FIRST_CREDIT = 2
MAX_CREDIT = 4
"""A draft costs one credit and earns one for every token that held; at none the source is given up for the answer."""


class _Source:
    """Tokens to copy from, with the credit that copying from them has left."""

    def __init__(self, min_context: int) -> None:
        self._min_context = min_context
        self._tokens: list[int] = []
        self._places: dict[int, list[int]] = {}
        self.credit = FIRST_CREDIT

    def append(self, token: int) -> None:
        self._places.setdefault(token, []).append(len(self._tokens))
        self._tokens.append(token)

    def following(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens behind the longest run that `tokens` ends with, at its latest place."""
        if self.credit <= 0:
            return []
        best, longest = 0, self._min_context - 1
        for place in reversed(self._places.get(tokens[-1], ())):
            if longest == MAX_CONTEXT:
                break
            length = self._common(tokens, place)
            if length > longest and place + 1 < len(self._tokens):
                best, longest = place, length
        return self._tokens[best + 1 : best + 1 + count] if longest >= self._min_context else []

    def _common(self, tokens: Sequence[int], place: int) -> int:
        """How many tokens up to `place` equal the last of `tokens`, at most `MAX_CONTEXT`."""
        limit = min(MAX_CONTEXT, len(tokens), place + 1)
        return next((n for n in range(1, limit) if tokens[-1 - n] != self._tokens[place - n]), limit)

    def settle(self, num_held: int) -> None:
        self.credit = min(MAX_CREDIT, self.credit - 1 + num_held)


class PromptLookup:
    """Drafts for one answer; whether more are made depends on what became of the ones before."""

    def __init__(self, given: Sequence[int], opening: Sequence[int], num_tokens: int) -> None:
        """Args:
        given: Token ids that the answer may repeat.
        opening: The tokens that the answer starts with.
        num_tokens: Longest draft.
        """
        self._given, self._answer = _Source(1), _Source(MIN_CONTEXT_IN_ANSWER)
        self._num_tokens = num_tokens
        self._used: _Source | None = None
        for token in given:
            self._given.append(token)
        for token in opening:
            self._answer.append(token)

    def append(self, token: int) -> None:
        """Takes note of the answer's next token."""
        self._answer.append(token)

    def draft(self, tokens: Sequence[int], room: int, banned: Callable[[Sequence[int]], list[int]]) -> list[int]:
        """Guesses how an answer goes on.

        Args:
            tokens: The answer so far.
            room: Most tokens that may be guessed.
            banned: The tokens that may not follow an answer; a draft ends before one.

        Returns:
            The guess, often empty.
        """
        for source in (self._given, self._answer):
            found = source.following(tokens, min(room, self._num_tokens))
            drafted = list(tokens)
            for token in found:
                if token in banned(drafted):
                    break
                drafted.append(token)
            if len(drafted) > len(tokens):
                self._used = source
                return drafted[len(tokens) :]
        return []

    def settle(self, num_held: int) -> None:
        """Says how many tokens of the last draft held."""
        assert self._used is not None, "nothing was drafted"
        self._used.settle(num_held)
