"""Whose turn it is: turns go round between callers; within a caller, first come is first served. Knows no engine."""

from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Turns(Generic[T]):
    """A queue of queues. No operation takes time that grows with its length."""

    def __init__(self) -> None:
        self._queues: OrderedDict[Hashable, OrderedDict[T, None]] = OrderedDict()  # the next caller's first
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def push(self, caller: Hashable, item: T) -> None:
        """Put an item behind the caller's others; a caller who has none gets its turn after all who have."""
        self._queues.setdefault(caller, OrderedDict())[item] = None
        self._num_items += 1

    def push_front(self, caller: Hashable, item: T) -> None:
        """Put an item that had its turn before back in front of the caller's others."""
        self.push(caller, item)
        self._queues[caller].move_to_end(item, last=False)

    def peek(self, served: Container[Hashable] = ()) -> T | None:
        """The item whose turn it is. Callers in `served` have theirs after all others, who are waiting for a first.

        Looks at as many callers as are in `served`, and one more.
        """
        caller = next((caller for caller in self._queues if caller not in served), next(iter(self._queues), None))
        return None if caller is None else next(iter(self._queues[caller]))

    def take(self, caller: Hashable, item: T) -> bool:
        """Remove an item because it is its turn: the next one is another caller's. False if it is not here."""
        is_here = self.remove(caller, item)
        if is_here and caller in self._queues:
            self._queues.move_to_end(caller)
        return is_here

    def remove(self, caller: Hashable, item: T) -> bool:
        """Remove an item, wherever it is; no turn is lost by that. False if it is not here."""
        queue = self._queues.get(caller)
        if queue is None or item not in queue:
            return False
        del queue[item]
        if not queue:
            del self._queues[caller]
        self._num_items -= 1
        return True

    def clear(self) -> None:
        """Remove everything."""
        self._queues.clear()
        self._num_items = 0
