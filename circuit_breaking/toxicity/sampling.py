"""A sample of distinct texts in bounded memory, the same whatever their order (layer 0)."""

import unicodedata
from collections import Counter
from hashlib import blake2b
from heapq import heappush, heappushpop
from typing import Any


def text_key(text: str, seed: int = 0) -> int:
    """A pseudorandom number in [0, 2^128) of seed and text; texts that `normalised` makes equal share it.

    `text` must be without lone surrogates.
    """
    return int.from_bytes(blake2b(f"{seed}\0{normalised(text)}".encode(), digest_size=16).digest(), "big")


def normalised(text: str) -> str:
    """What two texts share when they count as one: case, compatibility forms and white space set aside."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class SmallestKeys:
    """Of all items offered those with the `capacity` smallest distinct keys (bottom-k sampling, Cohen and Kaplan 2007).

    With hashed keys this is a uniform sample without replacement over distinct keys. Of the items with one key the
    smallest is kept, and `copies` counts them all. Neither depends on the order of the offers.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kept: dict[int, Any] = {}
        self.copies: Counter[int] = Counter()
        self._heap: list[int] = []  # negated keys: the largest key in front

    def offer(self, key: int, item: Any) -> None:
        if key in self.kept:
            self.kept[key] = min(self.kept[key], item)
        elif len(self.kept) < self.capacity:
            heappush(self._heap, -key)
            self.kept[key] = item
        elif key < -self._heap[0]:
            # the bound only falls, so a key that left never returns, and a key that stays was there from its first item
            gone = -heappushpop(self._heap, -key)
            del self.kept[gone], self.copies[gone]
            self.kept[key] = item
        else:
            return
        self.copies[key] += 1
