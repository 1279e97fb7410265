"""The small inputs of a decoder call: tokens, positions, slots and mask, the same for the host and a device.

The graph takes S new tokens of each of P prompts. A prompt with K rows (beams) that are fed n tokens each has S = K·n
of them, row after row. All its rows write to one KV cache of C slots; a row is told apart only by the slots that it
attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Slots = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class DecoderInputs:
    """Arrays on the host from which a decoder call is fed; reused for every call of one shape."""

    input_ids: Ids
    """`(P, S)`, the new tokens."""
    positions: Ids
    """`(P, S)`, position of each token in its row's answer."""
    slots: Ids
    """`(P, S)`, where in the prompt's cache the key and value of each token are written; distinct within a prompt."""
    visible: Bools
    """`(P, S, C)`, the slots that each token attends, its own among them."""

    def pad(self, batch_index: int, slots: Slots | None = None) -> None:
        """Fills the inputs of one prompt with tokens whose logits nobody reads; each attends itself only.

        Args:
            batch_index: Which of the P prompts.
            slots: `(S,)` slots to write to; None for the first S, for a batch index without a prompt.
        """
        num_tokens = self.slots.shape[1]
        self.input_ids[batch_index] = self.positions[batch_index] = 0
        self.slots[batch_index] = np.arange(num_tokens) if slots is None else slots
        # A softmax over no slot at all is NaN. It would be written to these slots as keys and values, and outlast the
        # mask of the next prompt that has this batch index, since 0 · NaN is NaN.
        self.visible[batch_index] = False
        self.visible[batch_index, np.arange(num_tokens), self.slots[batch_index]] = True


def input_fields(
    batch_size: int, num_tokens: int, capacity: int
) -> dict[str, tuple[tuple[int, ...], type[np.generic]]]:
    """Shape and dtype of each field of `DecoderInputs` by name, which is also the name of the graph's input.

    Args:
        batch_size: P.
        num_tokens: S.
        capacity: C.
    """
    tokens = batch_size, num_tokens
    return {
        "input_ids": (tokens, np.int64),
        "positions": (tokens, np.int64),
        "slots": (tokens, np.int64),
        "visible": ((*tokens, capacity), np.bool_),
    }


def token_positions(lengths: Ids, num_tokens: int, max_positions: int) -> Ids:
    """Positions `(…, n)` of the next n tokens of each row.

    Args:
        lengths: `(…)`, how many tokens each row has already.
        num_tokens: n.
        max_positions: Of the model.
    """
    # The padding behind a short draft may lie beyond the last position; nobody reads its logits.
    positions: Ids = np.minimum(lengths[..., None] + np.arange(num_tokens), max_positions - 1)
    return positions


@lru_cache(maxsize=64)
def causal_mask(num_rows: int, num_tokens: int) -> Bools:
    """Which of a prompt's S new tokens attend which, `(S, S)`: each attends itself and those before it in its own row.

    Args:
        num_rows: K.
        num_tokens: n, of each row.
    """
    # Block diagonal: rows are fed side by side and write to one cache, but must not see each other's new tokens.
    mask: Bools = np.kron(np.eye(num_rows, dtype=np.bool_), np.tri(num_tokens, dtype=np.bool_))
    mask.flags.writeable = False
    return mask
