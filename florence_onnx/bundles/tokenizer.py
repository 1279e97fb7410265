"""Prompts to token ids, and generated token ids to text with its location tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from florence_onnx.errors import BundleFileMissingError, BundleFormatError

Ids = npt.NDArray[np.int64]


class PromptTokenizer:
    """Florence-2's byte-level BPE tokenizer."""

    def __init__(self, path: Path, *, pad_token_id: int) -> None:
        """Loads a `tokenizer.json`.

        Args:
            path: The file.
            pad_token_id: Id that fills shorter prompts of a batch.

        Raises:
            BundleFileMissingError: There is no such file.
            BundleFormatError: The file is not a tokenizer.
        """
        if not path.is_file():
            raise BundleFileMissingError(f"tokenizer file {path} is missing; export or download the bundle again")
        from tokenizers import Tokenizer

        try:
            self._tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise BundleFormatError(f"{path} is not a tokenizer file: {error}") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._pad_token_id = pad_token_id
        self.image_token_id: int | None = self._tokenizer.token_to_id("<image>")
        """What stands for image tokens in transformers' `input_ids`; None in Microsoft's layout, which has no such token."""

    @cached_property
    def location_ids(self) -> range | None:
        """Ids of `<loc_0>` to `<loc_999>`; None where the vocabulary does not have them in a row."""
        ids = [self._tokenizer.token_to_id(f"<loc_{number}>") for number in (0, 999)]
        if None in ids or ids[1] - ids[0] != 999:
            return None
        return range(ids[0], ids[1] + 1)

    @cached_property
    def max_token_bytes(self) -> int:
        """UTF-8 bytes of the longest token, so that T tokens hold at most T times as many.

        In byte-level BPE each character of a token stands for one byte; special tokens are written as they are.
        """
        return max(
            len(token.encode()) if token.startswith("<") else len(token) for token in self._tokenizer.get_vocab()
        )

    def encode(self, prompts: Sequence[str]) -> tuple[Ids, Ids]:
        """Encodes prompts as `<s> prompt </s>`, padded on the right to the longest.

        Returns:
            `input_ids` and `attention_mask` (1 for tokens, 0 for padding), both `(B, T)`.
        """
        # one by one: encode_batch starts a thread pool, which takes longer than encoding a few short prompts
        encoded = [self._tokenizer.encode(prompt).ids for prompt in prompts]
        length = max(map(len, encoded))
        input_ids = np.full((len(encoded), length), self._pad_token_id, dtype=np.int64)
        attention_mask = np.zeros((len(encoded), length), dtype=np.int64)
        for row, ids in enumerate(encoded):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def encode_text(self, text: str) -> list[int]:
        """Encodes text without `<s>` and `</s>`."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decodes a generated sequence, with its special tokens (location tokens among them) unless they are to be skipped.

        Ids beyond the tokenizer's vocabulary decode to nothing: the embedding is padded to a round number of rows, and
        a model may generate the id of a padding row.
        """
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text
