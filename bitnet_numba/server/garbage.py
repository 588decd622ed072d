"""When Python's garbage collector runs in a process that serves: it stops all threads, for up to 15 ms at a time."""

import gc
import threading

# A full collection looks at all that running answers hold, so it is made this many times more rarely than Python does.
FULL = 10


def spare_collector(collect: bool = True) -> None:
    """Takes all objects that there are from the collector, which otherwise looks at each of them time and again: 0.1 s,
    in which nothing else runs. For a process that has loaded its model and serves it to its end.

    collect: first frees what is garbage among them, which takes as long once.
    """
    if collect:
        gc.collect()
    gc.freeze()


class RoundCollector:
    """While answers run, lets the collector run between rounds only: the device has its next step then, and no text
    waits to be told. For the thread that runs the rounds; there may be several."""

    _lock = threading.Lock()
    _holders = 0  # of all
    _automatic = True  # whether the collector ran by itself before the first of them

    def __init__(self) -> None:
        self._holds = False

    def hold(self) -> None:
        """Rounds begin: no collection but by `collect`."""
        if self._holds:
            return
        self._holds = True
        with RoundCollector._lock:
            if RoundCollector._holders == 0:
                RoundCollector._automatic = gc.isenabled()
                gc.disable()
            RoundCollector._holders += 1

    def collect(self) -> None:
        """After a round: collects what Python itself would have collected by now."""
        counts, (young, middle, old) = gc.get_count(), gc.get_threshold()
        for generation, threshold in ((2, FULL * old), (1, middle), (0, young)):
            if counts[generation] > threshold > 0:
                gc.collect(generation)
                return

    def release(self) -> None:
        """No more rounds for now: once all have none, Python collects as it did before."""
        if not self._holds:
            return
        self._holds = False
        with RoundCollector._lock:
            RoundCollector._holders -= 1
            if RoundCollector._holders == 0 and RoundCollector._automatic:
                gc.enable()
