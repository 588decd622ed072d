"""Pages of a batch's KV cache: reference counts, and a prefix cache over full pages of prompts and answers.

A sequence takes pages for what is known of it, and one more whenever its next token needs one. Full pages are shared: a
cached page is keyed by the cached page before it and by its own tokens, so a chain of cached pages is a beginning of
some sequence (tokens are compared, not only hashed). The first page of a chain is keyed by a salt instead: sequences
with different salts share nothing. Cached pages are never written again. After their sequences have ended they stay
cached until the pages are needed, and are evicted in LRU order.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_Node = int | str  # a cached page; or a salt, which stands before the first page of a sequence
_Key = tuple[_Node, tuple[int, ...]]  # node before, tokens of the page


@dataclass
class PageLease:
    """The pages of one sequence, in order."""

    pages: list[int]
    ids: Sequence[int]  # the tokens known so far; the caller may append to them
    computed: int  # leading tokens whose keys and values are in the pages
    last_node: _Node  # prefix-cache node of the last full computed page


class PagePool:
    """Pages 0 .. num_pages - 1: free, used by one sequence, or cached and used by any number of sequences."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))  # unused and not cached
        self._evictable: OrderedDict[int, None] = OrderedDict()  # unused but cached, least recently used first
        self._ref_counts = [0] * num_pages
        self._cache: dict[_Key, tuple[int, int]] = {}  # -> (own node, page); a node's number is never reused
        self._key_of: dict[int, _Key] = {}  # page -> key, for cached pages
        self._last_node = 0

    @property
    def free(self) -> int:
        """Number of pages that no sequence uses, including cached ones."""
        return len(self._free) + len(self._evictable)

    def pages_for(self, tokens: int) -> int:
        """Number of pages for `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(
        self, ids: Sequence[int], tokens: int, salt: str = "", spare: int = 0, reuse: bool = True
    ) -> PageLease | None:
        """Pages for `tokens` tokens of a sequence that starts with `ids`; None if fewer than `spare` would stay free.

        The longest cached beginning of `ids` is shared; the lease's `computed` is its length, which is less than that
        of `ids`: at least the last token has to be computed for its logits. reuse: False shares nothing.
        """
        node: _Node = salt
        shared: list[int] = []
        for start in range(0, len(ids) - self.page_size if reuse else 0, self.page_size):
            cached = self._cache.get((node, tuple(ids[start : start + self.page_size])))
            if cached is None:
                break
            node, page = cached
            shared.append(page)
        own = self.pages_for(tokens) - len(shared)
        if own + spare > self.free - sum(page in self._evictable for page in shared):
            return None
        for page in shared:
            self._evictable.pop(page, None)
            self._ref_counts[page] += 1
        pages = shared + [self._take_one() for _ in range(own)]
        return PageLease(pages, ids, len(shared) * self.page_size, node)

    def grow(self, lease: PageLease) -> int | None:
        """Adds a page to a lease and returns it; None if none is free."""
        if not self.free:
            return None
        lease.pages.append(self._take_one())
        return lease.pages[-1]

    def mark_computed(self, lease: PageLease, tokens: int) -> None:
        """The first `tokens` tokens of `lease.ids` have been computed: their full pages can be shared from now on."""
        for i in range(lease.computed // self.page_size, tokens // self.page_size):
            key = lease.last_node, tuple(lease.ids[i * self.page_size : (i + 1) * self.page_size])
            if key not in self._cache:
                self._last_node += 1
                self._cache[key] = self._last_node, lease.pages[i]
                self._key_of[lease.pages[i]] = key
            # Otherwise another sequence has computed the same page at the same time. The pages after it are cached
            # behind that one; should it be evicted first, they are not found any more, and are evicted in time.
            lease.last_node = self._cache[key][0]
        lease.computed = tokens

    def release(self, lease: PageLease) -> None:
        """Returns the pages of a sequence that has ended."""
        # In reverse: a page is then always evicted before the pages that lead to it.
        for page in reversed(lease.pages):
            self._ref_counts[page] -= 1
            if self._ref_counts[page] == 0:
                if page in self._key_of:
                    self._evictable[page] = None
                else:
                    self._free.append(page)
        lease.pages = []

    def forget(self, ids: Sequence[int], start: int, salt: str = "") -> None:
        """Takes the pages of a sequence from token `start` on out of the prefix cache: computing them may have failed.

        Pages cached after those are not found any more, and are evicted in time.
        """
        node: _Node = salt
        for first in range(0, len(ids), self.page_size):
            key = node, tuple(ids[first : first + self.page_size])
            cached = self._cache.get(key)
            if cached is None:
                return
            node, page = cached
            if first >= start // self.page_size * self.page_size:
                del self._cache[key], self._key_of[page]
                if page in self._evictable:
                    del self._evictable[page]
                    self._free.append(page)

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            del self._cache[self._key_of.pop(page)]
        self._ref_counts[page] = 1
        return page
