"""Who holds which page of a batch's keys and values, and which prompts' beginnings are already computed.

Sequences take all the pages they may ever need before they begin, so none can run out of room later. Full pages of
prompts are shared: a page is known by its tokens and by the known page before it, so a chain of known pages stands for
one beginning of a prompt, and its tokens are compared, not only hashed. Known pages are never written again. Pages of
sequences that have ended stay known until they are needed for others, the least recently used first.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_START = 0  # stands for the page before the first
_Key = tuple[int | None, tuple[int, ...]]


@dataclass
class PageLease:
    """One sequence's pages, in order."""

    pages: list[int]
    ids: Sequence[int]  # its prompt
    computed: int  # leading tokens of the prompt that the pages hold
    last_known: int | None  # number of the known page with the last whole page of these tokens; None: not its own


class PagePool:
    """Pages 0 .. num_pages - 1, each free, or held by one sequence, or known and held by any number of them."""

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._unknown = list(range(num_pages - 1, -1, -1))  # held by nobody, contents of no use
        self._idle: OrderedDict[int, None] = OrderedDict()  # known and held by nobody, the least recently used first
        self._holders = [0] * num_pages
        # Keys are (number of the known page before, tokens), values (own number, page). Numbers are never used twice.
        self._known: dict[_Key, tuple[int, int]] = {}
        self._key_of: dict[int, _Key] = {}
        self._last_number = _START

    @property
    def free(self) -> int:
        """Pages that nobody holds, known ones included."""
        return len(self._unknown) + len(self._idle)

    def pages_for(self, tokens: int) -> int:
        """How many pages hold that many tokens."""
        return -(-tokens // self.page_size)

    def take(self, ids: Sequence[int], tokens: int) -> PageLease | None:
        """Pages for a sequence that may feed `tokens` tokens, the prompt `ids` among them; None if too few are free.

        The beginning of the prompt that is known is shared: `computed` says how much. At least its last token is not.
        """
        number = _START
        shared: list[int] = []
        for start in range(0, len(ids) - self.page_size, self.page_size):
            known = self._known.get((number, tuple(ids[start : start + self.page_size])))
            if known is None:
                break
            number, page = known
            shared.append(page)
        own = self.pages_for(tokens) - len(shared)
        if own > self.free - sum(page in self._idle for page in shared):
            return None
        for page in shared:
            self._idle.pop(page, None)
            self._holders[page] += 1
        pages = shared + [self._take_one() for _ in range(own)]
        return PageLease(pages, ids, len(shared) * self.page_size, number)

    def computed(self, holding: PageLease, tokens: int) -> None:
        """Whoever holds these pages has computed the prompt's first `tokens` tokens: whole pages become known."""
        for i in range(holding.computed // self.page_size, tokens // self.page_size):
            key = holding.last_known, tuple(holding.ids[i * self.page_size : (i + 1) * self.page_size])
            if holding.last_known is None or key in self._known:
                # Another sequence has computed the same beside this one. What follows is not made known, since the page
                # before it could be forgotten while this sequence lives.
                holding.last_known = None
                break
            self._last_number += 1
            self._known[key] = self._last_number, holding.pages[i]
            self._key_of[holding.pages[i]] = key
            holding.last_known = self._last_number
        holding.computed = tokens

    def release(self, holding: PageLease) -> None:
        """The sequence has ended."""
        # The last first: a page is then always forgotten before those that lead to it.
        for page in reversed(holding.pages):
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._unknown.append(page)
        holding.pages = []

    def _take_one(self) -> int:
        if self._unknown:
            page = self._unknown.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            del self._known[self._key_of.pop(page)]
        self._holders[page] = 1
        return page
