"""Sequences that wait for a slot, in the order in which they are to be started."""

import bisect
from collections.abc import Collection, Iterator
from operator import attrgetter

from bitnet_numba.engine.sequence import Sequence

_by_order = attrgetter("order")


class WaitingQueue:
    """A queue by `Sequence.order`, from which those of some tenants can be passed over."""

    def __init__(self) -> None:
        self._of: dict[str, list[Sequence]] = {}  # by tenant, each in order, none empty
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        for sequences in self._of.values():
            yield from sequences

    def __contains__(self, s: Sequence) -> bool:
        own = self._of.get(s.options.tenant, [])
        place = bisect.bisect_left(own, s.order, key=_by_order)
        return place < len(own) and own[place] is s

    def put(self, s: Sequence) -> None:
        """Adds a sequence."""
        bisect.insort(self._of.setdefault(s.options.tenant, []), s, key=_by_order)
        self._length += 1

    def remove(self, s: Sequence) -> None:
        """Takes out a sequence that is in the queue."""
        own = self._of[s.options.tenant]
        del own[bisect.bisect_left(own, s.order, key=_by_order)]
        if not own:
            del self._of[s.options.tenant]
        self._length -= 1

    def first(self, passed_over: Collection[str] = ()) -> Sequence | None:
        """The first one, but for those of the tenants `passed_over`; None if there is none."""
        firsts = (own[0] for tenant, own in self._of.items() if tenant not in passed_over)
        return min(firsts, key=_by_order, default=None)

    def clear(self) -> None:
        """Takes out all."""
        self._of.clear()
        self._length = 0
