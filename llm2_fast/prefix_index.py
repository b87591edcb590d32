"""`PrefixIndex`: finds the prompts that begin most like another. Bookkeeping only, no tensors."""

from __future__ import annotations

from array import array
from bisect import bisect_left, insort
from collections.abc import Collection, Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item", bound=Hashable)

_TYPE = "I"  # of a token in a key
_SIZE = array(_TYPE).itemsize


def prompt_key(token_ids: list[int]) -> bytes:
    """The prompt in a form that is compared quickly."""
    return array(_TYPE, token_ids).tobytes()


def beginning(key: bytes, length: int) -> bytes:
    """The key of the first `length` tokens."""
    return key[: length * _SIZE]


def common_length(one: bytes, other: bytes) -> int:
    """Tokens that two prompts, given by their keys, begin with in common."""
    low, high = 0, min(len(one), len(other)) // _SIZE
    while low < high:
        middle = (low + high + 1) // 2
        if one[low * _SIZE : middle * _SIZE] == other[low * _SIZE : middle * _SIZE]:
            low = middle
        else:
            high = middle - 1
    return low


class PrefixIndex(Generic[Item]):
    """Items by the keys of their prompts.

    Keys are sorted by their bytes. What a key begins with in common with others can only shrink with the distance, so
    its neighbours on both sides are all that has to be looked at.
    """

    def __init__(self) -> None:
        self._keys: list[bytes] = []
        self._items: dict[bytes, dict[Item, None]] = {}

    def add(self, key: bytes, item: Item) -> None:
        """Note an item with a prompt."""
        if key not in self._items:
            insort(self._keys, key)
            self._items[key] = {}
        self._items[key][item] = None

    def discard(self, key: bytes, item: Item) -> None:
        """Forget an item if it is there."""
        items = self._items.get(key, {})
        items.pop(item, None)
        if not items and key in self._items:
            del self._items[key]
            del self._keys[bisect_left(self._keys, key)]

    def nearest(self, key: bytes) -> Iterator[tuple[int, Collection[Item]]]:
        """Of the same prompt and its neighbours, up to three: tokens in common with `key`, and the items.

        No other prompt has more in common with `key`.
        """
        place = bisect_left(self._keys, key)
        end = place + (key in self._items) + 1
        for other in self._keys[max(0, place - 1) : end]:
            yield common_length(key, other), self._items[other].keys()
