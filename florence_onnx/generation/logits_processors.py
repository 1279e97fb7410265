"""Logits processors that amount to a few banned tokens or a single forced one.

transformers' processors write into whole rows of scores. These name the tokens instead, so that the searches need no row
(and a device need not send one). What changes scores in other ways is in `dense_processors`.
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


class EncoderNGrams:
    """Bans tokens that would complete an n-gram of the prompt (`encoder_no_repeat_ngram_size`)."""

    def __init__(self, size: int, encoder_ids: Sequence[int]) -> None:
        self._size = size
        self._following: dict[tuple[int, ...], list[int]] = {}
        for end in range(size, len(encoder_ids) + 1):
            ngram = tuple(encoder_ids[end - size : end])
            self._following.setdefault(ngram[:-1], []).append(ngram[-1])

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that must not follow a row."""
        start = len(tokens) - self._size + 1
        return self._following.get(tuple(tokens[start:]), []) if start >= 0 else []


class BadWords:
    """Bans the last token of a sequence whose other tokens end a row (`bad_words_ids`)."""

    def __init__(self, words: Sequence[tuple[int, ...]], end_tokens: Sequence[int]) -> None:
        # transformers lets a lone end token be, since an answer could not end otherwise
        self._single = [word[0] for word in words if len(word) == 1 and word[0] not in end_tokens]
        self._longer = [word for word in words if len(word) > 1]

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that must not follow a row."""
        # a word as long as the whole row, or longer, is not looked for: as in transformers, whose rows must hold all of it
        return self._single + [word[-1] for word in self._longer if ends_with(tokens, word)]


def ends_with(tokens: Sequence[int], word: Sequence[int]) -> bool:
    """Whether a row of at least `len(word)` tokens ends with all of a word but its last token."""
    return len(word) <= len(tokens) and list(tokens[1 - len(word) :]) == list(word[:-1])


class LogitsProcessors:
    """The banning and forcing processors of one prompt, in transformers' order: a forced token overrules banned ones."""

    def __init__(self, config: SearchConfig, initial_tokens: Sequence[int], encoder_ids: Sequence[int] = ()) -> None:
        """Sets up the processors that a configuration asks for.

        Args:
            config: How to search.
            initial_tokens: The tokens that every row starts with.
            encoder_ids: What the text encoder was fed, image tokens included.
        """
        self._ngrams = NoRepeatNGram(config.no_repeat_ngram_size) if config.no_repeat_ngram_size else None
        size = config.encoder_no_repeat_ngram_size
        self._scans: list[EncoderNGrams | BadWords] = [EncoderNGrams(size, encoder_ids)] if size else []
        if config.bad_words_ids:
            self._scans.append(BadWords(config.bad_words_ids, config.end_tokens))
        self._min_length = 1 + config.min_new_tokens
        self._end_tokens = config.end_tokens
        self._suppressed = list(config.suppress_tokens)
        # the first token that is not forced
        self._begin = 1 if config.forced_bos_token_id is None else 2
        self._suppressed_first = list(config.begin_suppress_tokens)
        self._forced: dict[int, tuple[int, ...]] = {}
        if config.forced_bos_token_id is not None:
            self._forced[1] = (config.forced_bos_token_id,)
        if config.forced_eos_token_id is not None:
            # set last: where both fall on the same length, transformers forces the end token
            self._forced[config.max_length - 1] = config.forced_end_tokens
        for length in range(1, len(initial_tokens) + 1):
            self.add(initial_tokens[:length])

    def add(self, tokens: Sequence[int]) -> None:
        """Takes note of a row that has just grown by one token."""
        if self._ngrams is not None:
            self._ngrams.add(tokens)

    def forced(self, length: int) -> int | None:
        """The only token that may follow a row of `length` tokens, or None. (Several are a matter of dense processors.)"""
        found = self._forced.get(length)
        return None if found is None else found[0]

    def all_forced(self, length: int) -> tuple[int, ...]:
        """The tokens of which one must follow a row of `length` tokens; none where any may."""
        return self._forced.get(length, ())

    def banned(self, tokens: Sequence[int]) -> list[int]:
        """The tokens that must not follow a row in which the next token is not forced."""
        return self.banned_before_forcing(tokens) + self.suppressed(len(tokens))

    def banned_before_forcing(self, tokens: Sequence[int]) -> list[int]:
        """Those of them that a forced token overrules."""
        banned = [] if self._ngrams is None else self._ngrams.banned(tokens)
        for scan in self._scans:
            banned = banned + scan.banned(tokens)
        if len(tokens) < self._min_length:
            banned = [*banned, *self._end_tokens]
        return banned

    def suppressed(self, length: int) -> list[int]:
        """Those of them that are banned after a token was forced."""
        if length == self._begin and self._suppressed_first:
            return self._suppressed + self._suppressed_first
        return self._suppressed
