"""What every search has in common: its interface, its answers, and the tokens known before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from florence_onnx.options import SearchConfig

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class GeneratedSequence:
    """One answer in tokens."""

    token_ids: tuple[int, ...]
    """From the decoder start token to the end token, without padding."""
    truncated: bool
    """Whether the token limit ended it before the model did."""


@dataclass(frozen=True)
class Continuation:
    """What the decoder does next."""

    rows: Ids
    """`(R,)` the present row that each next row continues."""
    prompts: Ids
    """`(P,)` the present prompts that stay."""
    token_ids: Ids
    """`(R, S)` what each next row is fed; every token behind the first is a draft to be verified."""
    kept: Ids | None = None
    """`(present rows,)` how many of the tokens last fed hold; None where all do."""


class Search(Protocol):
    """A way to choose tokens."""

    def start(self) -> Ids:
        """The tokens `(P, S)` that open every prompt's answer."""

    def advance(self, logits: Floats) -> Continuation | None:
        """Takes the next decision.

        Args:
            logits: `(rows, S, V)` after each token that was fed (after the last one only at the start); may be
                overwritten.

        Returns:
            How to go on, or None when all is done.
        """

    def results(self) -> list[GeneratedSequence]:
        """One answer per prompt, in the order of the prompts."""


def opening(config: SearchConfig) -> list[int]:
    """The tokens known before anything is computed: the start token, and a forced first token after it.

    Feeding both in one step saves a decoder call. Where the limit leaves room for one token only, the forced last
    token has precedence, as in transformers.
    """
    forced = config.forced_bos_token_id
    if forced is None or forced == config.eos_token_id or config.max_length <= 2:
        return [config.decoder_start_token_id]
    return [config.decoder_start_token_id, forced]
