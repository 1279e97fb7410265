"""Logits processors: which tokens are forbidden, and which one is forced.

transformers' processors write into whole rows of scores. All that Florence-2 needs come down to a few forbidden tokens
or a single forced one, so the searches ask for those and touch nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

from florence_onnx.generation.options import SearchConfig


class NoRepeatNGram:
    """Forbids tokens that would complete an n-gram which a row already holds.

    One index serves all beams of a prompt. It maps the first n - 1 tokens of every n-gram that any of them ever ended
    with to the places where it ended; a row then counts an entry only if it holds the n-gram at that place. So a beam
    that takes over another's history takes over nothing else, and a token costs one look-up, however long the row.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._ends: dict[tuple[int, ...], list[int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Notes the n-gram with which a row, just grown by one token, ends."""
        last = len(tokens) - 1
        if last + 1 < self._size:
            return
        ends = self._ends.setdefault(tuple(tokens[last - self._size + 1 : last]), [])
        if last not in ends:
            ends.append(last)

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that may not follow a row."""
        start = len(tokens) - self._size + 1
        if start < 0:
            return []
        prefix = tuple(tokens[start:])
        before = self._size - 1
        return [
            tokens[end]
            for end in self._ends.get(prefix, ())
            if end < len(tokens) and tuple(tokens[end - before : end]) == prefix
        ]


class LogitsProcessors:
    """All processors of one prompt, in transformers' order: a forced token overrules what is forbidden."""

    def __init__(self, config: SearchConfig, opening: Sequence[int]) -> None:
        """Args:
        config: What is asked for.
        opening: The tokens that every row starts with.
        """
        self._ngrams = NoRepeatNGram(config.no_repeat_ngram_size) if config.no_repeat_ngram_size else None
        self._min_length = 1 + config.min_new_tokens
        self._eos_token_id = config.eos_token_id
        self._forced: dict[int, int] = {}
        if config.forced_bos_token_id is not None:
            self._forced[1] = config.forced_bos_token_id
        if config.forced_eos_token_id is not None:
            self._forced[config.max_length - 1] = config.forced_eos_token_id
        for length in range(1, len(opening) + 1):
            self.add(opening[:length])

    def add(self, tokens: Sequence[int]) -> None:
        """Takes note of a row that has just grown by its last token."""
        if self._ngrams is not None:
            self._ngrams.add(tokens)

    def forced(self, length: int) -> int | None:
        """The only token that may follow a row of `length` tokens, if there is one."""
        return self._forced.get(length)

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that may not follow a row, where none is forced."""
        banned = [] if self._ngrams is None else self._ngrams.banned(tokens)
        if len(tokens) < self._min_length:
            banned.append(self._eos_token_id)
        return banned
