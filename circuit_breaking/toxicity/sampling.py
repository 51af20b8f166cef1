"""A random sample of distinct texts in bounded memory, independent of their order."""

import unicodedata
from collections import Counter
from hashlib import blake2b
from heapq import heappush, heappushpop
from typing import Any


def text_key(text: str, seed: int = 0) -> int:
    """A pseudorandom number in [0, 2^128) from seed and text, the same for texts that are equal when `normalised`.

    `text` must not contain lone surrogates.
    """
    return int.from_bytes(blake2b(f"{seed}\0{normalised(text)}".encode(), digest_size=16).digest(), "big")


def normalised(text: str) -> str:
    """The text without differences in case, compatibility forms and white space: equal for texts that count as one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


class SmallestKeys:
    """Keeps the items with the `capacity` smallest distinct keys (bottom-k sampling, Cohen and Kaplan 2007).

    With hashed keys this is a uniform sample without replacement over distinct keys. Of the items with the same key,
    the smallest is kept, and `copies` counts all of them. The result does not depend on the order of the items.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.kept: dict[int, Any] = {}
        self.copies: Counter[int] = Counter()
        self._heap: list[int] = []  # negated keys, so that the largest key comes first

    def offer(self, key: int, item: Any) -> None:
        if key in self.kept:
            self.kept[key] = min(self.kept[key], item)
        elif len(self.kept) < self.capacity:
            heappush(self._heap, -key)
            self.kept[key] = item
        elif key < -self._heap[0]:
            # the largest key kept only falls: a removed key never returns, and a kept key has counted all of its items
            gone = -heappushpop(self._heap, -key)
            del self.kept[gone], self.copies[gone]
            self.kept[key] = item
        else:
            return
        self.copies[key] += 1
