"""Neighbours of an item in the orders in which clients traverse a directory."""

from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Order(Enum):
    """The orders in which clients traverse directories; the likeliest one first."""

    #: The order of readdir(3), as find(1) and scripts use it.
    LISTED = "listed"
    #: Sorted by name, as ls(1) does.
    BY_NAME = "by name"
    #: The same two backwards: bash expands patterns with `*` in this order, and `ls -r` sorts so.
    LISTED_BACKWARDS = "listed, backwards"
    BY_NAME_BACKWARDS = "by name, backwards"

    @property
    def is_by_name(self) -> bool:
        """Whether the names are sorted."""
        return self in (Order.BY_NAME, Order.BY_NAME_BACKWARDS)

    @property
    def step(self) -> int:
        """1, or -1 if the order starts with the last item."""
        return 1 if self in (Order.LISTED, Order.BY_NAME) else -1

    @property
    def reversed(self) -> "Order":
        """The same order from the other end."""
        return _REVERSED[self]


_REVERSED = {
    Order.LISTED: Order.LISTED_BACKWARDS,
    Order.BY_NAME: Order.BY_NAME_BACKWARDS,
    Order.LISTED_BACKWARDS: Order.LISTED,
    Order.BY_NAME_BACKWARDS: Order.BY_NAME,
}


class OrderIndex(Generic[T]):
    """Immutable index of items by their position in each order.

    Args:
        items: in the listed order.
        name: returns the unique name of an item, by which items are sorted; None if the items are
            names themselves.
    """

    __slots__ = ("_by_name", "_listed", "_listed_positions", "_name")  # one per traversed run

    def __init__(self, items: Iterable[T], name: Callable[[T], Any] | None = None) -> None:
        self._listed = tuple(items)
        names: Sequence[Any] = (
            self._listed if name is None else [name(each) for each in self._listed]
        )
        by_name = sorted(range(len(names)), key=names.__getitem__)
        self._by_name = tuple(self._listed[position] for position in by_name)
        self._listed_positions = array("I", by_name)  # by the position in the sorted order
        self._name = name

    def first(self, order: Order) -> T | None:
        """Return the first item of an order, or None if there are no items."""
        items = self._by_name if order.is_by_name else self._listed
        return items[0 if order.step > 0 else -1] if items else None

    def next(self, name: Any, order: Order) -> T | None:
        """Return the item after the one with a name, or None if it is the last one or absent."""
        position = bisect_left(self._by_name, name, key=self._name)
        if position == len(self._by_name) or self._name_at(position) != name:
            return None
        items = self._by_name
        if not order.is_by_name:
            items, position = self._listed, self._listed_positions[position]
        position += order.step
        return items[position] if 0 <= position < len(items) else None

    def _name_at(self, position: int) -> Any:
        item = self._by_name[position]
        return item if self._name is None else self._name(item)
