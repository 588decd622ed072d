"""Pages of a batch: who holds them, and which beginnings of prompts are shared."""

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from bitnet_numba.engine.page_pool import PageLease, PagePool

NUM_PAGES, PAGE = 12, 3


class Pages(RuleBasedStateMachine):
    """Sequences come, compute their prompts bit by bit and go; `contents` is what a device would have written."""

    holdings: Bundle[PageLease] = Bundle("holdings")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE)
        self.live: list[PageLease] = []
        self.contents: list[tuple[int, ...] | None] = [None] * NUM_PAGES  # all tokens up to the page's last

    # Few different tokens and beginnings, so that prompts often share some
    @rule(target=holdings, ids=st.lists(st.integers(0, 1), min_size=1, max_size=14), more=st.integers(0, 12))
    def take(self, ids: list[int], more: int) -> PageLease:
        free, needed = self.pool.free, -(-(len(ids) + more) // PAGE)
        holding = self.pool.take(ids, len(ids) + more)
        if holding is None:
            assert self.pool.free == free < needed
            return PageLease([], ids, 0, None)
        shared = holding.computed
        assert shared % PAGE == 0 and shared < len(ids)
        assert len(holding.pages) == len(set(holding.pages)) == needed
        for i, page in enumerate(holding.pages[: shared // PAGE]):
            assert self.contents[page] == tuple(ids[: (i + 1) * PAGE]), "a shared page holds other tokens"
        for page in holding.pages[shared // PAGE :]:
            assert not any(page in other.pages for other in self.live), "a page was given to two"
            self.contents[page] = None  # a sequence writes to it now
        self.live.append(holding)
        return holding

    @rule(holding=holdings, share=st.floats(0, 1))
    def compute(self, holding: PageLease, share: float) -> None:
        if not holding.pages:
            return
        rest = len(holding.ids) - holding.computed
        pages = round(share * rest / PAGE)
        tokens = min(len(holding.ids), (holding.computed // PAGE + pages) * PAGE)
        if tokens < holding.computed:
            return
        for i in range(holding.computed // PAGE, tokens // PAGE):
            self.contents[holding.pages[i]] = tuple(holding.ids[: (i + 1) * PAGE])
        self.pool.computed(holding, tokens)

    @rule(holding=consumes(holdings))
    def release(self, holding: PageLease) -> None:
        self.live = [other for other in self.live if other is not holding]
        self.pool.release(holding)

    @rule(holding=holdings)
    def the_same_again_shares_all_it_can(self, holding: PageLease) -> None:
        again = self.pool.take(holding.ids, len(holding.ids))
        if again is None:
            return
        most = (len(holding.ids) - 1) // PAGE * PAGE
        # What a sequence computed beside another that did the same first is that one's to share.
        assert holding.last_known is None or again.computed >= min(holding.computed // PAGE * PAGE, most)
        for page in again.pages[again.computed // PAGE :]:
            self.contents[page] = None
        self.pool.release(again)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        held = [page for holding in self.live for page in holding.pages]
        assert self.pool.free + len(set(held)) == NUM_PAGES
        for page in set(held):
            if held.count(page) > 1:
                assert self.contents[page] is not None, "a page that is not full is shared"

    @invariant()
    def pages_that_lead_to_a_known_page_are_known(self) -> None:
        """So nothing is kept that cannot be found."""
        numbers = {number for number, _ in self.pool._known.values()} | {0}
        assert all(number in numbers for number, _ in self.pool._known)
        assert sorted(self.pool._key_of) == sorted(page for _, page in self.pool._known.values())


TestPages = Pages.TestCase


def test_what_is_not_needed_goes_first_when_room_is_short() -> None:
    pool = PagePool(4, 2)
    old, new = pool.take([1, 2, 3], 4), pool.take([5, 6, 7], 4)
    assert old and new and pool.free == 0 and pool.take([9], 1) is None
    for holding in (old, new):
        pool.computed(holding, 3)
        pool.release(holding)
    assert pool.free == 4
    third = pool.take([8, 8, 8, 8, 8], 6)  # one page more than is unknown: the oldest known one goes
    assert third is not None and third.computed == 0
    pool.release(third)
    again = pool.take([5, 6, 7], 4)
    assert again is not None and again.computed == 2 and again.pages[0] == new_page(pool, [5, 6])
    pool.release(again)
    gone = pool.take([1, 2, 3], 4)
    assert gone is not None and gone.computed == 0


def new_page(pool: PagePool, tokens: list[int]) -> int:
    return pool._known[0, tuple(tokens)][1]


def test_the_last_token_of_a_prompt_is_always_left_to_compute() -> None:
    pool = PagePool(9, 4)
    first = pool.take(list(range(8)), 9)
    assert first is not None
    pool.computed(first, 8)
    same, longer = pool.take(list(range(8)), 9), pool.take(list(range(9)), 9)
    assert same is not None and same.computed == 4
    assert longer is not None and longer.computed == 8 and longer.pages[:2] == first.pages[:2]


def test_equal_hashes_are_not_equal_tokens() -> None:
    """Python's hashes of -1 and -2 are equal: the tokens themselves decide."""
    pool = PagePool(4, 1)
    first = pool.take([-1, 0], 2)
    assert first is not None
    pool.computed(first, 2)
    assert hash((0, (-1,))) == hash((0, (-2,)))
    other = pool.take([-2, 0], 2)
    assert other is not None and other.computed == 0
