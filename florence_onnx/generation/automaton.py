"""A graph of tokens: every path from its start to its end is an answer."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from florence_onnx.errors import OptionsError
from florence_onnx.generation.constraints import Ids, contains

END, DEAD = -1, -2
"""Nodes after the end token, and after a token that was not allowed (in a beam that fills up the batch, whose score is minus
infinity)."""
_FEW = 8
"""Ids of an arc that are looked up one by one."""


@dataclass(frozen=True)
class Arc:
    """Tokens that lead from a node to another one."""

    ids: Ids
    """`(n,)`, increasing; those of the arcs of a node are different."""
    target: int
    is_ordered: bool = False
    """Whether only tokens count that are at least the one two places before: x2 and y2 behind x1 and y1. The last of `ids` must be
    at least as great as any such token."""


class State(NamedTuple):
    """A node, and the last two tokens for its ordered arcs."""

    node: int
    before_last: int
    last: int


class _Node:
    """The arcs of a node, prepared for lookups."""

    def __init__(self, arcs: Sequence[Arc]) -> None:
        self.arcs = tuple(arcs)
        self.targets = {token: arc.target for arc in arcs if len(arc.ids) <= _FEW for token in arc.ids.tolist()}
        self.wide = tuple(arc for arc in arcs if len(arc.ids) > _FEW)
        self.has_order = any(arc.is_ordered for arc in arcs)
        self.costs: tuple[int, ...] = ()
        self.unions: dict[tuple[Arc, ...] | int, Ids] = {}

    def target(self, token: int) -> int:
        found = self.targets.get(token)
        if found is not None:
            return found
        return next((arc.target for arc in self.wide if contains(arc.ids, token)), DEAD)

    def within(self, limit: int) -> Ids:
        """The ids of all arcs of at most some cost, increasing; kept, since the union of large arcs takes time."""
        if limit not in self.unions:
            chosen = [arc.ids for arc, cost in zip(self.arcs, self.costs, strict=True) if cost <= limit]
            self.unions[limit] = np.sort(np.concatenate(chosen))
        return self.unions[limit]


class Automaton:
    """A `Constraint`. Where the token limit is near, it allows only what leaves room to reach the end."""

    def __init__(
        self, arcs: Mapping[int, Sequence[Arc]], *, first: int, after_bos: int, end_tokens: Sequence[int]
    ) -> None:
        """Prepares a graph.

        Args:
            arcs: By node; `END` is a target only.
            first: Node after the decoder start token.
            after_bos: Node after a forced first token.
            end_tokens: All that end an answer; the arcs to `END` have them.
        """
        self._first, self._after_bos = first, after_bos
        self._end_tokens = np.unique(np.array(end_tokens, dtype=np.int64))
        distances = _distances(arcs)
        # a vocabulary may lack the bytes that would complete a character
        possible = {node: [arc for arc in found if arc.target in distances] for node, found in arcs.items()}
        self._nodes = {node: _Node(found) for node, found in possible.items() if found}
        for node in self._nodes.values():
            node.costs = tuple(1 + distances[arc.target] for arc in node.arcs)
        self._distances = distances

    def check(self, room: int, *, has_bos: bool) -> None:
        """Checks that the shortest answer fits.

        Args:
            room: Most tokens, end token included.
            has_bos: Whether the first of them is given.

        Raises:
            OptionsError: It does not.
        """
        needed = 1 + self._distances[self._after_bos] if has_bos else self._distances[self._first]
        if room < needed:
            raise OptionsError(f"constrain needs at least {needed} tokens for an answer, but max_new_tokens is {room}")

    def start(self, tokens: Sequence[int]) -> State:
        node = self._first if len(tokens) == 1 else self._after_bos
        return State(node, -1, tokens[-1])

    def extend(self, state: State, token: int) -> State:
        node = self._nodes.get(state.node)
        return State(DEAD if node is None else node.target(token), state.last, token)

    def allowed(self, state: State, room: int | None) -> Ids:
        node = self._nodes.get(state.node)
        if node is None:
            return self._end_tokens
        # where a forced token has taken the room that was left, the nearest end
        limit = max(node.costs) if room is None else max(min(room, max(node.costs)), min(node.costs))
        if not node.has_order:
            return node.within(limit)
        (arc,) = node.arcs
        return arc.ids[np.searchsorted(arc.ids, state.before_last) :]


def _distances(arcs: Mapping[int, Sequence[Arc]]) -> dict[int, int]:
    """For each node the fewest tokens to the end, the end token included."""
    before: dict[int, set[int]] = {}
    for node, found in arcs.items():
        for arc in found:
            before.setdefault(arc.target, set()).add(node)
    distances = {END: 0}
    waiting = deque([END])
    while waiting:
        node = waiting.popleft()
        for earlier in before.get(node, ()):
            if earlier not in distances:
                distances[earlier] = distances[node] + 1
                waiting.append(earlier)
    return distances
