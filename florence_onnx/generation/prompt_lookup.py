"""Prompt lookup decoding: drafts the next tokens by copying from the prompt's input and from the answer so far.

A grounding answer repeats the caption's phrases, an answer about a region repeats its four location tokens. A rejected
draft costs little: a decode step is bound by reading the weights, which it does once, for one token or for five.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_CONTEXT = 3
"""Longest run of tokens that is compared to find a place to copy from; the longest match wins."""

MIN_CONTEXT_IN_ANSWER = 2
"""Tokens that must match in the answer so far. After a single one it seldom goes on as before: "red star", then "red
circle" (measured on the demo model: 57 of 62 such drafts were wrong)."""

FIRST_CREDIT = 2
MAX_CREDIT = 4
"""A draft costs one credit and earns one for every accepted token; a source without credit is not used any more."""


class _Source:
    """A sequence of tokens to copy from, and its credit."""

    def __init__(self, min_context: int) -> None:
        self._min_context = min_context
        self._tokens: list[int] = []
        self._positions: dict[int, list[int]] = {}  # of each token, so that a lookup does not scan the sequence
        self.credit = FIRST_CREDIT

    def append(self, token: int) -> None:
        self._positions.setdefault(token, []).append(len(self._tokens))
        self._tokens.append(token)

    def following(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that follow the longest (of equals the latest) match with the end of `tokens`."""
        if self.credit <= 0:
            return []
        best, longest = 0, self._min_context - 1
        for position in reversed(self._positions.get(tokens[-1], ())):
            if longest == MAX_CONTEXT:
                break
            length = self._match_length(tokens, position)
            if length > longest and position + 1 < len(self._tokens):
                best, longest = position, length
        return self._tokens[best + 1 : best + 1 + count] if longest >= self._min_context else []

    def _match_length(self, tokens: Sequence[int], position: int) -> int:
        """How many tokens up to `position` equal the last ones of `tokens`, at most `MAX_CONTEXT`; at least 1."""
        limit = min(MAX_CONTEXT, len(tokens), position + 1)
        return next((n for n in range(1, limit) if tokens[-1 - n] != self._tokens[position - n]), limit)

    def record(self, num_accepted: int) -> None:
        self.credit = min(MAX_CREDIT, self.credit - 1 + num_accepted)


class PromptLookup:
    """Drafts for one answer. A source whose drafts are mostly rejected is given up."""

    def __init__(self, lookup_ids: Sequence[int], initial_tokens: Sequence[int], num_tokens: int) -> None:
        """Fills the two sources, the prompt's input and the answer.

        Args:
            lookup_ids: Token ids of the prompt's input, which the answer may repeat.
            initial_tokens: The first tokens of the answer.
            num_tokens: Most tokens in a draft.
        """
        self._input, self._answer = _Source(1), _Source(MIN_CONTEXT_IN_ANSWER)
        self._num_tokens = num_tokens
        self._used: _Source | None = None
        for token in lookup_ids:
            self._input.append(token)
        for token in initial_tokens:
            self._answer.append(token)

    def append(self, token: int) -> None:
        """Adds the answer's next token."""
        self._answer.append(token)

    def draft(self, tokens: Sequence[int], room: int, banned: Callable[[Sequence[int]], list[int]]) -> list[int]:
        """Drafts the tokens that may follow an answer.

        Args:
            tokens: The answer so far.
            room: Most tokens that may follow.
            banned: Returns the tokens that must not follow an answer; a draft ends before one, since it would be
                rejected.

        Returns:
            The draft, often empty.
        """
        for source in (self._input, self._answer):
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

    def record(self, num_accepted: int) -> None:
        """Records how many tokens of the last draft were accepted."""
        assert self._used is not None, "nothing was drafted"
        self._used.record(num_accepted)
