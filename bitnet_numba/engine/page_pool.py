"""Pages of a batch's KV cache: reference counts, and a prefix cache over full pages of prompts.

A sequence takes all pages that it may need before it starts, so it cannot run out of memory later. Full pages of
prompts are shared: a cached page is keyed by the cached page before it and by its own tokens, so a chain of cached
pages is a prompt prefix (tokens are compared, not only hashed). Cached pages are never written again. After their
sequences have ended they stay cached until the pages are needed, and are evicted in LRU order.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_ROOT = 0  # the node before the first page of every prompt
_Key = tuple[int | None, tuple[int, ...]]  # node before, tokens of the page


@dataclass
class PageLease:
    """The pages of one sequence, in order."""

    pages: list[int]
    ids: Sequence[int]  # the prompt
    computed: int  # leading prompt tokens whose keys and values are in the pages
    last_node: int | None  # prefix-cache node of the last full computed page; None: later pages are not cached


class PagePool:
    """Pages 0 .. num_pages - 1: free, used by one sequence, or cached and used by any number of sequences."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))  # unused and not cached
        self._evictable: OrderedDict[int, None] = OrderedDict()  # unused but cached, least recently used first
        self._ref_counts = [0] * num_pages
        self._cache: dict[_Key, tuple[int, int]] = {}  # -> (own node, page); a node's number is never reused
        self._key_of: dict[int, _Key] = {}  # page -> key, for cached pages
        self._last_node = _ROOT

    @property
    def free(self) -> int:
        """Number of pages that no sequence uses, including cached ones."""
        return len(self._free) + len(self._evictable)

    def pages_for(self, tokens: int) -> int:
        """Number of pages for `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, ids: Sequence[int], tokens: int, reuse: bool = True) -> PageLease | None:
        """Pages for a sequence of up to `tokens` tokens that starts with the prompt `ids`; None if too few are free.

        The longest cached prefix of the prompt is shared; the lease's `computed` is its length, which is less than the
        prompt's: at least the last token has to be computed for its logits. reuse: False shares nothing.
        """
        node = _ROOT
        shared: list[int] = []
        for start in range(0, len(ids) - self.page_size if reuse else 0, self.page_size):
            cached = self._cache.get((node, tuple(ids[start : start + self.page_size])))
            if cached is None:
                break
            node, page = cached
            shared.append(page)
        own = self.pages_for(tokens) - len(shared)
        if own > self.free - sum(page in self._evictable for page in shared):
            return None
        for page in shared:
            self._evictable.pop(page, None)
            self._ref_counts[page] += 1
        pages = shared + [self._take_one() for _ in range(own)]
        return PageLease(pages, ids, len(shared) * self.page_size, node)

    def mark_computed(self, lease: PageLease, tokens: int) -> None:
        """The prompt's first `tokens` tokens have been computed: their full pages can be shared from now on."""
        for i in range(lease.computed // self.page_size, tokens // self.page_size):
            key = lease.last_node, tuple(lease.ids[i * self.page_size : (i + 1) * self.page_size])
            if lease.last_node is None or key in self._cache:
                # Another sequence computed the same page at the same time. The pages after it are not cached either:
                # the page before them could be evicted while this sequence still runs.
                lease.last_node = None
                break
            self._last_node += 1
            self._cache[key] = self._last_node, lease.pages[i]
            self._key_of[lease.pages[i]] = key
            lease.last_node = self._last_node
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

    def forget(self, lease: PageLease, start: int) -> None:
        """Takes a lease's pages from token `start` on out of the prefix cache: computing them may have failed."""
        for page in lease.pages[start // self.page_size :]:
            key = self._key_of.pop(page, None)
            if key is not None:
                del self._cache[key]  # pages cached after it are not found any more, and are evicted in time
        lease.last_node = None

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._evictable.popitem(last=False)
            del self._cache[self._key_of.pop(page)]
        self._ref_counts[page] = 1
        return page
