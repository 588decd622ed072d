"""Pages of a batch: who uses them, and which beginnings of sequences are shared."""

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from bitnet_numba.engine.page_pool import PageLease, PagePool

NUM_PAGES, PAGE = 12, 3


class Pages(RuleBasedStateMachine):
    """Sequences start, are computed in chunks, grow and end; `contents` is what a device would have written."""

    leases: Bundle[PageLease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, PAGE)
        self.live: list[PageLease] = []
        self.salts: dict[int, str] = {}  # by the lease's id
        self.contents: list[tuple[str | int, ...] | None] = [None] * NUM_PAGES  # salt, tokens up to the page's last

    # Few different tokens, so that prompts often share a prefix
    @rule(
        target=leases,
        ids=st.lists(st.integers(0, 1), min_size=1, max_size=14),
        more=st.integers(0, 12),
        salt=st.sampled_from(["", "a"]),
        spare=st.integers(0, 2),
    )
    def take(self, ids: list[int], more: int, salt: str, spare: int) -> PageLease:
        free, needed = self.pool.free, -(-(len(ids) + more) // PAGE)
        lease = self.pool.take(ids, len(ids) + more, salt, spare)
        if lease is None:
            assert self.pool.free == free < needed + spare
            return PageLease([], ids, 0, salt)
        assert self.pool.free >= spare
        self.salts[id(lease)] = salt
        shared = lease.computed
        assert shared % PAGE == 0 and shared < len(ids)
        assert len(lease.pages) == len(set(lease.pages)) == needed
        for i, page in enumerate(lease.pages[: shared // PAGE]):
            assert self.contents[page] == (salt, *ids[: (i + 1) * PAGE]), "a shared page holds other tokens"
        for page in lease.pages[shared // PAGE :]:
            assert not any(page in other.pages for other in self.live), "two sequences write to one page"
            self.contents[page] = None  # a sequence writes to it now
        self.live.append(lease)
        return lease

    @rule(lease=leases, share=st.floats(0, 1))
    def compute(self, lease: PageLease, share: float) -> None:
        if not lease.pages:
            return
        rest = len(lease.ids) - lease.computed
        pages = round(share * rest / PAGE)
        tokens = min(len(lease.ids), (lease.computed // PAGE + pages) * PAGE)
        if tokens < lease.computed:
            return
        for i in range(lease.computed // PAGE, tokens // PAGE):
            self.contents[lease.pages[i]] = (self.salts[id(lease)], *lease.ids[: (i + 1) * PAGE])
        self.pool.mark_computed(lease, tokens)

    @rule(lease=leases, ids=st.lists(st.integers(0, 1), min_size=1, max_size=5))
    def answer(self, lease: PageLease, ids: list[int]) -> None:
        """Tokens are added to the sequence and computed, one by one, as far as there are pages."""
        if not lease.pages or lease.computed < len(lease.ids):
            return
        assert isinstance(lease.ids, list)
        for i in ids:
            if len(lease.ids) == len(lease.pages) * PAGE:
                free, page = self.pool.free, self.pool.grow(lease)
                if page is None:
                    assert free == 0
                    return
                assert lease.pages[-1] == page and not any(page in o.pages for o in self.live if o is not lease)
                self.contents[page] = None
            lease.ids.append(i)
            if len(lease.ids) % PAGE == 0:
                self.contents[lease.pages[len(lease.ids) // PAGE - 1]] = (self.salts[id(lease)], *lease.ids)
            self.pool.mark_computed(lease, len(lease.ids))

    @rule(lease=leases, share=st.floats(0, 1))
    def forget(self, lease: PageLease, share: float) -> None:
        if lease.pages:
            start = round(share * len(lease.ids))
            self.pool.forget(lease.ids, start, self.salts[id(lease)])
            again = self.pool.take([*lease.ids, 0], 0, self.salts[id(lease)])
            assert again is None or again.computed <= start // PAGE * PAGE
            if again is not None:
                self.pool.release(again)

    @rule(lease=consumes(leases))
    def release(self, lease: PageLease) -> None:
        self.live = [other for other in self.live if other is not lease]
        self.pool.release(lease)

    @rule(lease=leases)
    def the_same_again_shares_all_it_can(self, lease: PageLease) -> None:
        if not lease.pages:
            return
        again = self.pool.take(lease.ids, len(lease.ids), self.salts[id(lease)])
        if again is None:
            return
        nodes = {node for node, _ in self.pool._cache.values()}
        if lease.last_node in nodes:  # it has not been forgotten
            assert again.computed <= (len(lease.ids) - 1) // PAGE * PAGE
        for page in again.pages[again.computed // PAGE :]:
            self.contents[page] = None
        self.pool.release(again)

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        used = [page for lease in self.live for page in lease.pages]
        assert self.pool.free + len(set(used)) == NUM_PAGES
        for page in set(used):
            if used.count(page) > 1:
                assert self.contents[page] is not None, "a page that is not full is shared"

    @invariant()
    def every_cached_page_has_its_key(self) -> None:
        assert sorted(self.pool._key_of) == sorted(page for _, page in self.pool._cache.values())


TestPages = Pages.TestCase


def test_the_least_recently_used_pages_are_evicted_first() -> None:
    pool = PagePool(4, 2)
    old, new = pool.take([1, 2, 3], 4), pool.take([5, 6, 7], 4)
    assert old and new and pool.free == 0 and pool.take([9], 1) is None
    for lease in (old, new):
        pool.mark_computed(lease, 3)
        pool.release(lease)
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
    return pool._cache["", tuple(tokens)][1]


def test_the_last_token_of_a_prompt_is_always_left_to_compute() -> None:
    pool = PagePool(9, 4)
    first = pool.take(list(range(8)), 9)
    assert first is not None
    pool.mark_computed(first, 8)
    same, longer = pool.take(list(range(8)), 9), pool.take(list(range(9)), 9)
    assert same is not None and same.computed == 4
    assert longer is not None and longer.computed == 8 and longer.pages[:2] == first.pages[:2]


def test_equal_hashes_are_not_equal_tokens() -> None:
    """Python's hashes of -1 and -2 are equal: the tokens themselves decide."""
    pool = PagePool(4, 1)
    first = pool.take([-1, 0], 2)
    assert first is not None
    pool.mark_computed(first, 2)
    assert hash(("", (-1,))) == hash(("", (-2,)))
    other = pool.take([-2, 0], 2)
    assert other is not None and other.computed == 0
