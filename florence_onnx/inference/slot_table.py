"""Which slots of its cache each row of a prompt attends: the host's side of a cache that is never moved.

A row is a set of slots. Beams share the history that they have in common, another order of beams is another order of the sets, a draft
that was wrong is a slot of no set; and a slot of no set is written again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Places = npt.NDArray[np.intp]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CallInputs:
    """What a decoder call reads about S tokens of each of some prompts, in arrays that are reused."""

    input_ids: Ids
    """`(P, S)`."""
    positions: Ids
    """`(P, S)`."""
    slots: Ids
    """`(P, S)`."""
    visible: Bools
    """`(P, S, C)`."""

    def idle(self, place: int) -> None:
        """Makes a prompt's part harmless: each token attends itself, since of nothing at all the softmax is no number."""
        num_tokens = self.slots.shape[1]
        self.input_ids[place] = self.positions[place] = 0
        self.slots[place] = np.arange(num_tokens)
        self.visible[place] = np.eye(num_tokens, self.visible.shape[2], dtype=np.bool_)


@lru_cache(maxsize=64)
def _own_history(width: int, num_tokens: int) -> tuple[Places, Places]:
    """Of W rows with n new tokens each, one after the other: the pairs of tokens of which the first attends the second."""
    causal = np.kron(np.eye(width, dtype=np.bool_), np.tri(num_tokens, dtype=np.bool_))
    attending, attended = np.nonzero(causal)
    return attending, attended


class PromptRows:
    """The rows of one prompt."""

    def __init__(self, capacity: int, max_positions: int) -> None:
        """Args:
        capacity: Slots of the prompt's cache.
        max_positions: Of the model.
        """
        self._max_positions = max_positions
        self._visible: Bools = np.zeros((1, capacity), dtype=np.bool_)
        self._lengths: Ids = np.zeros(1, dtype=np.int64)
        self._free: Places = np.arange(capacity)
        self._fed: Places = np.zeros((1, 0), dtype=np.intp)

    @property
    def num_used(self) -> int:
        """Slots that some row attends."""
        return int(self._visible.any(axis=0).sum())

    def has_room(self, num_slots: int) -> bool:
        """Whether so many tokens can be written; looks for slots that no row attends any more, if it must."""
        if len(self._free) < num_slots:
            self._free = np.flatnonzero(~self._visible.any(axis=0))
        return len(self._free) >= num_slots

    def grow(self, capacity: int) -> None:
        """Adds slots at the end."""
        more = capacity - self._visible.shape[1]
        self._free = np.concatenate([self._free, np.arange(self._visible.shape[1], capacity)])
        self._visible = np.pad(self._visible, ((0, 0), (0, more)))

    def feed(self, token_ids: Ids, call: CallInputs, place: int) -> None:
        """Writes a prompt's part of a decoder call.

        Args:
            token_ids: `(W, n)`; `has_room` for as many tokens as the call has for each prompt.
            call: With S ≥ W·n; what is left over attends itself and is read by nobody.
            place: The prompt's.
        """
        width, num_tokens = token_ids.shape
        count = token_ids.size
        slots = self._free[: call.slots.shape[1]]
        call.idle(place)
        call.slots[place] = slots
        call.input_ids[place, :count] = token_ids.reshape(-1)
        positions = self._lengths[:, None] + np.arange(num_tokens)
        # what pads a short draft may lie beyond the last position; nobody reads its logits
        call.positions[place, :count] = np.minimum(positions, self._max_positions - 1).reshape(-1)
        visible = call.visible[place]
        visible[:count] = np.repeat(self._visible, num_tokens, axis=0)
        attending, attended = _own_history(width, num_tokens)
        visible[attending, slots[attended]] = True
        visible[count:] = False
        visible[np.arange(count, len(slots)), slots[count:]] = True
        self._free = self._free[count:]
        self._fed = slots[:count].reshape(width, num_tokens)
        self._visible[np.arange(width)[:, None], self._fed] = True
        self._lengths += num_tokens

    def keep(self, counts: Ids) -> None:
        """Keeps the first tokens that were fed last, and forgets the others.

        Args:
            counts: `(W,)`, at least 1 each.
        """
        for row, count in enumerate(counts):
            self._visible[row, self._fed[row, count:]] = False
        self._lengths += counts - self._fed.shape[1]

    def reorder(self, rows: Ids) -> None:
        """Lets new row i continue old row `rows[i]`."""
        self._visible = self._visible[rows]
        self._lengths = self._lengths[rows]
