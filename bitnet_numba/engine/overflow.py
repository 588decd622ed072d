"""Conversations that have become too long for the context: the oldest exchanges go.

system | user, assistant | user, assistant | user, assistant | user        the system message and the last exchange
  kept   dropped first     then this         ...               kept        always stay whole
"""

import bisect
from collections.abc import Callable, Mapping, Sequence

from bitnet_numba.errors import ContextFull
from bitnet_numba.text.chat_template import Message

Encode = Callable[[Sequence[Message]], list[int]]  # raises ContextFull for what is longer than the context


def roll(
    messages: Sequence[Message], encode: Encode, capacity: int, max_new_tokens: int | None
) -> tuple[list[int], int]:
    """The token ids of a conversation without as many of its oldest messages as it takes, and how many these are.

    Exchanges go, one by one, until prompt and answer fit: the answer gets `max_new_tokens`, a quarter of the context
    where that is None, and never more than half of it. An exchange begins with a user's message and has all up to the
    next one. If that is not enough room, the last exchange stays, and the answer gets what is left. Raises ContextFull
    if even that exchange does not fit.
    """
    answer = min(capacity // 4 if max_new_tokens is None else max_new_tokens, capacity // 2)
    kept, starts = _exchanges(messages)

    def without(count: int) -> Sequence[Message]:
        return [*messages[:kept], *messages[starts[count] :]] if count else messages

    def fits(count: int) -> bool:
        try:
            return len(encode(without(count))) <= capacity - answer
        except ContextFull:
            return False

    most = len(starts) - 1
    count = 0 if most < 1 or fits(0) else bisect.bisect_left(range(most), True, lo=1, key=fits)
    return encode(without(count)), starts[count] - kept if count else 0


def _exchanges(messages: Sequence[Message]) -> tuple[int, list[int]]:
    """How many messages the system's are, at the beginning, and where each exchange begins."""
    roles = [message.get("role") if isinstance(message, Mapping) else None for message in messages]
    kept = next((i for i, role in enumerate(roles) if role not in ("system", "developer")), len(roles))
    return kept, [kept, *(i for i in range(kept + 1, len(roles)) if roles[i] == "user")]
