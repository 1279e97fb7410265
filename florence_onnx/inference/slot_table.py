"""Which cache slots each row of a prompt attends: the host's record of a cache that stays where it is on the device.

A row (beam) is a set of slots. Beams with a common history share its slots, so to reorder beams is to reorder sets, and
no key or value is moved. A rejected draft token is a slot in no set, and a slot in no set is free to be written again.
"""

from __future__ import annotations

import numpy as np

from florence_onnx.inference.decoder_inputs import Bools, DecoderInputs, Ids, Slots, causal_mask, token_positions


class SlotTable:
    """The slots of one prompt: which are free, and which each of its K rows attends. Starts with one empty row."""

    def __init__(self, capacity: int, max_positions: int) -> None:
        """Args:
        capacity: C, slots of the prompt's cache.
        max_positions: Of the model.
        """
        self._max_positions = max_positions
        self._visible: Bools = np.zeros((1, capacity), dtype=np.bool_)  # (K, C)
        self._lengths: Ids = np.zeros(1, dtype=np.int64)  # (K,)
        self._free: Slots = np.arange(capacity)
        self._fed: Slots = np.zeros((1, 0), dtype=np.intp)  # (K, n), slots of the last call

    def has_room(self, num_slots: int) -> bool:
        """Whether `num_slots` tokens can be written; collects the slots that no row attends any more when it must."""
        if len(self._free) < num_slots:
            self._free = np.flatnonzero(~self._visible.any(axis=0))
        return len(self._free) >= num_slots

    def grow(self, capacity: int) -> None:
        """Adds free slots behind the present ones, up to `capacity` in all."""
        more = capacity - self._visible.shape[1]
        self._free = np.concatenate([self._free, np.arange(self._visible.shape[1], capacity)])
        self._visible = np.pad(self._visible, ((0, 0), (0, more)))

    def feed(self, token_ids: Ids, inputs: DecoderInputs, batch_index: int) -> None:
        """Writes this prompt's part of the inputs of a decoder call, and gives every row its new tokens.

        Args:
            token_ids: `(K, n)`.
            inputs: For S ≥ K·n tokens of each prompt, as many as `has_room` was asked for; the rest is padding.
            batch_index: Of the prompt.
        """
        num_rows, num_tokens = token_ids.shape
        count = token_ids.size
        slots = self._free[: inputs.slots.shape[1]]
        inputs.pad(batch_index, slots)
        inputs.input_ids[batch_index, :count] = token_ids.reshape(-1)
        positions = token_positions(self._lengths, num_tokens, self._max_positions)
        inputs.positions[batch_index, :count] = positions.reshape(-1)
        visible = inputs.visible[batch_index, :count]
        visible[:] = np.repeat(self._visible, num_tokens, axis=0)
        visible[:, slots[:count]] = causal_mask(num_rows, num_tokens)
        self._free = self._free[count:]
        self._fed = slots[:count].reshape(num_rows, num_tokens)
        self._visible[np.arange(num_rows)[:, None], self._fed] = True
        self._lengths += num_tokens

    def keep(self, counts: Ids) -> None:
        """Keeps the first tokens of the last `feed` in each row and forgets the others.

        Args:
            counts: `(K,)`, at least 1 each.
        """
        for row, count in enumerate(counts):
            self._visible[row, self._fed[row, count:]] = False
        self._lengths += counts - self._fed.shape[1]

    def reorder(self, rows: Ids) -> None:
        """Lets new row i continue old row `rows[i]`; there may be more or fewer rows than before."""
        self._visible = self._visible[rows]
        self._lengths = self._lengths[rows]
