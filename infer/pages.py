"""The pages of the KV cache: who holds them, and which are kept for prompts that begin alike.

A page is room for `size` tokens of one sequence; the arrays are on the device, here are their numbers alone. A
page that is full never changes again, so it may be shared: its name is a digest of its tokens and of all tokens
before them (a chain, as in PagedAttention, arXiv 2309.06180). Only full pages are shared and a sequence writes
after them, so there is no copy on write: nothing that is shared is ever written.

The invariant: a page is free, or held by as many sequences as its count says, or kept: named and held by nobody,
to be found again or, least recently used first, to be taken.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np


def extend_names(names: list[bytes], tokens: Sequence[int], size: int, *, apart: bytes = b"") -> None:
    """Add the names of the pages that tokens fill to those of the first of them, which are known.

    apart: what else their keys and values depend on.
    """
    for start in range(len(names) * size, len(tokens) - size + 1, size):
        before = names[-1] if names else apart
        page = np.asarray(tokens[start : start + size], np.int32).tobytes()
        names.append(hashlib.blake2b(before + page, digest_size=16).digest())


class PagePool:
    """Pages 0 to num_pages - 1, each of size tokens."""

    def __init__(self, num_pages: int, size: int):
        """All are free."""
        self.num_pages, self.size = num_pages, size
        self._free = list(range(num_pages))[::-1]
        self._holders = [0] * num_pages
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """How many pages can be taken: the free and the kept."""
        return len(self._free) + len(self._kept)

    def num_for(self, tokens: int) -> int:
        """How many pages so many tokens need."""
        return -(-tokens // self.size)

    def num_found(self, names: Sequence[bytes]) -> int:
        """How many pages from the first on are here by these names."""
        return next((i for i, name in enumerate(names) if name not in self._pages), len(names))

    def share(self, names: Sequence[bytes]) -> list[int]:
        """Hold the pages of these names from the first on, up to one that is not here."""
        pages = [self._pages[name] for name in names[: self.num_found(names)]]
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return pages

    def take(self, count: int) -> list[int]:
        """Hold pages that nobody does; what they held is forgotten. Not more than are available."""
        assert count <= self.available, (count, self.available)
        return [self._take() for _ in range(count)]

    def blank(self) -> int:
        """A page that holds nothing and that nobody holds, good until the next is taken."""
        (page,) = self.take(1)
        self.give_back([page])
        return page

    def _take(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._pages[self._names.pop(page)]
        self._holders[page] = 1
        return page

    def name(self, pages: Iterable[int], names: Iterable[bytes]) -> None:
        """Name full pages, so that they can be shared. A name that another page has already stays with that one."""
        for page, name in zip(pages, names, strict=True):
            if page not in self._names and name not in self._pages:
                self._names[page], self._pages[name] = name, page

    def give_back(self, pages: Sequence[int]) -> None:
        """Hold these pages of one sequence no longer; the last is the first to be taken again."""
        for page in reversed(pages):
            assert self._holders[page] > 0, page
            self._holders[page] -= 1
            if not self._holders[page]:
                if page in self._names:
                    self._kept[page] = None
                else:
                    self._free.append(page)
