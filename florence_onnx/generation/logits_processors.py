"""Logits processors: which tokens are banned next, and which one is forced.

transformers' processors write into whole rows of scores. All that Florence-2 needs amount to a few banned tokens or a
single forced one, so these processors name those tokens, and the searches change nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from florence_onnx.generation.options import SearchConfig


class NoRepeatNGram:
    """Bans tokens that would complete an n-gram which the row already contains (`no_repeat_ngram_size`).

    One index serves all beams of a prompt: it maps the first n - 1 tokens of every n-gram that any beam has ended with
    to the positions of its last token. A row counts an entry only if its own tokens at that position are that n-gram,
    so nothing has to be copied or removed when beams are reordered, and a lookup costs the same however long the row
    is.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Indexes the n-gram at the end of a row that has just grown by one token."""
        last = len(tokens) - 1
        if last + 1 < self._size:
            return
        ends = self._ends.setdefault(tuple(tokens[last - self._size + 1 : last]), [])
        if last not in ends:
            ends.append(last)

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that must not follow a row."""
        start = len(tokens) - self._size + 1
        if start < 0:
            return []
        prefix = tuple(tokens[start:])
        before = self._size - 1
        # the entry may come from another beam: check that this row has the same tokens there
        return [
            tokens[end]
            for end in self._ends.get(prefix, ())
            if end < len(tokens) and tuple(tokens[end - before : end]) == prefix
        ]


class LogitsProcessors:
    """All processors of one prompt, in transformers' order: a forced token overrules banned ones."""

    def __init__(self, config: SearchConfig, initial_tokens: Sequence[int]) -> None:
        """Sets up the processors that a configuration asks for.

        Args:
            config: How to search.
            initial_tokens: The tokens that every row starts with.
        """
        self._ngrams = NoRepeatNGram(config.no_repeat_ngram_size) if config.no_repeat_ngram_size else None
        self._min_length = 1 + config.min_new_tokens
        self._eos_token_id = config.eos_token_id
        self._forced: dict[int, int] = {}
        if config.forced_bos_token_id is not None:
            self._forced[1] = config.forced_bos_token_id
        if config.forced_eos_token_id is not None:
            # set last: where both fall on the same length, transformers forces the end token
            self._forced[config.max_length - 1] = config.forced_eos_token_id
        for length in range(1, len(initial_tokens) + 1):
            self.add(initial_tokens[:length])

    def add(self, tokens: Sequence[int]) -> None:
        """Takes note of a row that has just grown by one token."""
        if self._ngrams is not None:
            self._ngrams.add(tokens)

    def forced(self, length: int) -> int | None:
        """The only token that may follow a row of `length` tokens, or None."""
        return self._forced.get(length)

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that must not follow a row in which the next token is not forced."""
        banned = [] if self._ngrams is None else self._ngrams.banned(tokens)
        if len(tokens) < self._min_length:
            banned.append(self._eos_token_id)
        return banned
