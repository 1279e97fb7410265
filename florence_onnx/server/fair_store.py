"""A bounded store whose room is shared among its owners, so that one client cannot drop everybody's entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Value = TypeVar("Value")


@dataclass
class _Owned(Generic[Value]):
    num_bytes: int = 0
    entries: OrderedDict[str, tuple[int, Value]] = field(default_factory=OrderedDict)


class FairStore(Generic[Value]):
    """Entries by key, in the order in which they were added, each with an owner and a size. Not thread-safe.

    What has to go is the oldest entry of the owner who holds the most: as long as a client keeps less than its share,
    nothing that others add drops an entry of it.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        """Bytes of all entries together."""
        self._owner_of: OrderedDict[str, str] = OrderedDict()
        self._owned: dict[str, _Owned[Value]] = {}

    def __len__(self) -> int:
        return len(self._owner_of)

    def __iter__(self) -> Iterator[Value]:
        return (self._owned[owner].entries[key][1] for key, owner in self._owner_of.items())

    def add(self, key: str, value: Value, owner: str, num_bytes: int = 0) -> None:
        """Adds an entry under a new key."""
        owned = self._owned.setdefault(owner, _Owned())
        owned.entries[key] = num_bytes, value
        owned.num_bytes += num_bytes
        self.num_bytes += num_bytes
        self._owner_of[key] = owner

    def get(self, key: str) -> Value | None:
        """Returns an entry, or None if there is none."""
        owner = self._owner_of.get(key)
        return None if owner is None else self._owned[owner].entries[key][1]

    def pop(self, key: str) -> Value | None:
        """Removes an entry and returns it; None if there is none."""
        owner = self._owner_of.pop(key, None)
        if owner is None:
            return None
        owned = self._owned[owner]
        num_bytes, value = owned.entries.pop(key)
        owned.num_bytes -= num_bytes
        self.num_bytes -= num_bytes
        if not owned.entries:
            del self._owned[owner]
        return value

    def oldest(self) -> tuple[str, Value] | None:
        """Returns the entry that was added first, with its key; None if the store is empty."""
        key = next(iter(self._owner_of), None)
        return None if key is None else (key, self._owned[self._owner_of[key]].entries[key][1])

    def pop_excess(self, *, by_bytes: bool = False) -> Value | None:
        """Removes the oldest entry of the owner who holds the most and returns it; None if the store is empty.

        Args:
            by_bytes: Whether the most bytes count, not the most entries.
        """
        if not self._owned:
            return None
        most = max(self._owned.values(), key=lambda owned: owned.num_bytes if by_bytes else len(owned.entries))
        return self.pop(next(iter(most.entries)))
