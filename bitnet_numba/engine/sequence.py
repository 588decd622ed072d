"""A request on its way through a scheduler, and what is told of it."""

import math
from collections import abc
from dataclasses import dataclass, field
from typing import NamedTuple

from bitnet_numba.engine.completion import Completion, CompletionBuilder
from bitnet_numba.engine.page_pool import PageLease
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import Request
from bitnet_numba.errors import BitNetError
from bitnet_numba.sampling import TokenLogprob

GOLDEN_RATIO = 0.6180339887  # multiples of it are spread evenly, modulo 1, however many there are
Logprobs = abc.Sequence[TokenLogprob | None]  # of the tokens of one call of a backend


class Update(NamedTuple):
    """What is new for one request. Its last update has either a completion or an error."""

    request: int  # the id that `add` returned
    text: str = ""  # follows the text of earlier updates
    completion: Completion | None = None
    error: BitNetError | None = None
    token_ids: abc.Sequence[int] = ()  # those of `text`, after those of earlier updates; together, the completion's
    logprobs: abc.Sequence[TokenLogprob] = ()  # of these, if SamplingParams.logprobs asks for them
    prompt_logprobs: abc.Sequence[TokenLogprob | None] = ()  # told once, as soon as they are known


@dataclass(eq=False)
class Sequence:
    """A request that a scheduler has accepted, until its last update.

    It may be started several times: when its pages are needed by others it loses them and waits again.
    """

    id: int
    request: Request
    options: QueueOptions
    max_cached: int  # most tokens that it puts into the KV cache: its prompt and its answer but for the last token
    ids: list[int] = field(init=False)  # the prompt and the tokens of the answer that have been received
    prompt_length: int = field(init=False)
    max_tokens: int = field(init=False)  # of the answer until it is as long as allowed or the context is full
    order: tuple[int, int] = field(init=False)  # who comes first: the lower
    builder: CompletionBuilder | None = None  # None: it has never been started
    reused: int = 0  # leading prompt tokens that were in the prefix cache when it was first started
    ended: bool = False
    quiet: bool = False  # whether only its last update is told
    tell_at: float = 0.0  # when its next text is to be told; 0: at once, of the first token; infinity: never
    # While `ids` is shorter, all that is done of a token that is plain (see `CompletionBuilder`) is to add it to them.
    plain_below: int = 0
    plain_at: float = 0.0  # when the last of those came
    replayed: bool = False  # whether computing its answer's tokens again as a prompt is not the same, see `BatchRunner`
    # Since it was last started:
    starts: int = 0  # how often that was
    slot: int = -1
    lease: PageLease | None = None  # None while it has no slot
    room: int = 0  # tokens that its pages hold
    known: int = 0  # leading tokens of `ids` that it was started with
    ready: bool = False  # whether these have been enqueued, so that it can be stepped
    enqueued: int = 0  # tokens of the answer that the backend knows or has been asked for
    received: int = 0  # of these, tokens known at the start or received

    def __post_init__(self) -> None:
        self.ids = list(self.request.ids)
        self.prompt_length = len(self.ids)
        self.max_tokens = self.max_cached - self.prompt_length + 1
        self.order = self.options.priority, self.id
        if self.quiet:
            self.tell_at = math.inf

    def caught_up(self) -> CompletionBuilder:
        """The builder, once it has been given every token received; the sequence must have been started."""
        assert self.builder is not None
        missing = self.ids[self.prompt_length + self.builder.num_tokens :]
        if missing:
            self.builder.push_plain(missing, self.plain_at)
        return self.builder


class Telling(NamedTuple):
    """The time of a round, and for how long text is kept: whose answers' text is told in the round."""

    now: float  # seconds
    coalesce: float

    def has_turn(self, s: Sequence) -> bool:
        """Whether a sequence's text is told; asked once for each token.

        The second time comes early, each sequence's by another share: those that start together are then told of in
        turns, and no round has all of them.
        """
        if self.now < s.tell_at:
            return False
        s.tell_at = self.now + self.coalesce * (1.0 if s.tell_at else s.id * GOLDEN_RATIO % 1.0)
        return True
