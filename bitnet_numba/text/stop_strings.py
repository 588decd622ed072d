"""Finds stop strings in text that arrives in pieces."""

import re
from collections.abc import Sequence


class StopStrings:
    """Cuts a stream of text before the first stop string to be completed; of several completed at once, the longest.

    Text that could be the start of a stop string is held back. The division into pieces makes no difference.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self.held = ""  # text that may be the start of a stop string
        self.found = False
        # Most pieces have no character that a stop string begins with.
        self._begins = re.compile("|".join({re.escape(stop[0]) for stop in stops})).search if stops else None
        self._longest = max((len(stop) for stop in stops), default=0)

    def push(self, piece: str) -> str:
        """The text that can be shown now; after `found`, push no more."""
        if self._begins is None or not (self.held or self._begins(piece)):
            return piece
        text = self.held + piece
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stops if stop in text]
        if ends:
            self.found, self.held = True, ""
            return text[: min(ends)[1]]
        # The longest suffix that is a proper prefix of a stop string.
        tails = (text[i:] for i in range(max(len(text) - self._longest + 1, 0), len(text)))
        self.held = next((tail for tail in tails if any(stop.startswith(tail) for stop in self._stops)), "")
        return text[: len(text) - len(self.held)]

    def finish(self) -> str:
        """The text that was held back, at the end of the stream."""
        held, self.held = self.held, ""
        return held
