"""Random events on a scheduler, and what must hold after each: what `test_soak` does for a short while, and
`tools/soak.py` for a long one."""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from unittest import mock

from bitnet_numba.engine import request_queue
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import Request, read_request
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.sequence import Update
from bitnet_numba.errors import QueueFull, QueueTimeout, SchedulerClosed
from bitnet_numba.grammar import Grammar
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams

SEQUENCES, WAITING, PER_TENANT = 6, 20, 4
TENANTS, SALTS = ("a", "b", "c"), ("", "x")
KINDS = {"step": 60, "add": 26, "cancel": 5, "time": 6, "close": 0.01, "fail": 0.01}  # how often, in comparison
FORM = Grammar.regex(r"[a-z]{1,9}( [a-z]{1,9}){0,20}\.")  # of some answers


@dataclass
class Open:
    """A request that has not ended."""

    request: Request
    quiet: bool
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class Soak:
    """Drives schedulers of one engine, one after another: closed or failed ones are replaced.

    alone: the completion that a request gets alone. fail: makes the backend fail in the next step.
    """

    def __init__(
        self,
        llm: Engine,
        tokens: int,
        alone: Callable[[Request], Completion],
        fail: Callable[[], None],
        seed: int = 0,
    ):
        self.llm, self.tokens, self.alone, self.fail = llm, tokens, alone, fail
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.now = 0.0
        self.open: dict[int, Open] = {}
        self.rolled = [self._conversation(turns) for turns in (1, 3, 60)]
        self.answered: list[list[int]] = []  # conversations that go on: prompts with their answers
        self.scheduler = self._new_scheduler()

    def run(self, events: int) -> None:
        """So many events."""
        kinds, weights = list(KINDS), list(KINDS.values())
        with mock.patch.object(request_queue, "monotonic", lambda: self.now):
            for kind in self.random.choices(kinds, weights, k=events):
                self.counts[kind] += 1
                getattr(self, kind)()

    def finish(self) -> None:
        """Steps until nothing is left, which is soon."""
        self.scheduler.drain()
        for _ in range(1000 * (1 + len(self.open))):
            if not self.scheduler.wait(0):
                break
            self.step()
        assert not self.open and not self.scheduler.busy, "nothing comes to an end"
        self.scheduler.close()

    def add(self) -> None:
        """A request comes: a new one, one that begins like others, one that goes on, or a long conversation."""
        pick = self.random
        params = SamplingParams(
            pick.choice((0.0, 0.9)),
            seed=pick.randrange(1 << 20),
            max_new_tokens=pick.choice((1, 5, 20, 60)),
            stop=pick.choice(((), (), (), "e", ("th", "a "))),
            grammar=pick.choice((None,) * 9 + (FORM,)),
            logprobs=pick.choice((None, None, 0, 3)),
        )
        kind = pick.random()
        if kind < 0.05:
            request = pick.choice(self.rolled)
            self.counts["rolled"] += request.dropped_messages > 0
        else:
            # Where steps round differently, an answer that shares an earlier one's pages is not the one given alone.
            if kind < 0.2 and self.answered and not self.scheduler._replayed:
                ids = [*pick.choice(self.answered), pick.randrange(1900)]
            else:
                ids = [*range(100, 100 + pick.choice((0, 0, 8, 30))), *pick.choices(range(1900), k=pick.randint(1, 12))]
            vocab = self.llm.config.vocab_size
            ids = [i % vocab for i in ids][-self.llm.context :]
            request = read_request(self.llm.tokenizer, vocab, self.llm.context, ids, params)
        options = QueueOptions(
            pick.choice((0, 0, 0, 1, -1)),
            pick.choice(TENANTS),
            pick.choice(SALTS),
            pick.choice((None, None, 30)),
            pick.choice((None, None, None, 50)),
        )
        try:
            quiet = pick.random() < 0.2
            number = self.scheduler.add_request(request, options, quiet=quiet)
        except QueueFull:
            self.counts["full"] += 1
            return
        self.open[number] = Open(request, quiet)

    def step(self) -> None:
        """A round, and the checks of all that it tells."""
        runner = self.scheduler._runner
        before = set(runner.running)
        for update in self.scheduler.step(coalesce=self.random.choice([0.0, 0.001, 0.004])):
            self._take(update)
        if self.scheduler.closed:
            assert not self.open, "a request was not answered"
            self.scheduler = self._new_scheduler()
            return
        self.counts["preempted"] += len((before & self.open.keys()) - runner.running.keys())
        assert len(runner.running) + runner.free_slots == SEQUENCES
        tenants = Counter(s.options.tenant for s in runner.running.values())
        assert all(count <= PER_TENANT for count in tenants.values())
        used = {page for s in runner.running.values() if s.lease for page in s.lease.pages}
        assert runner.pool.free + len(used) == runner.pool.num_pages, "a page is lost, or used and free"
        assert len(self.open) == self.scheduler.running + self.scheduler.waiting + len(self._told_later())

    def cancel(self) -> None:
        """Somebody does not want an answer any more, or not one that has ended."""
        if self.open:
            self.scheduler.cancel(self.random.choice([*self.open, 0]))

    def time(self) -> None:
        """Time passes."""
        self.now += self.random.expovariate(0.2)

    def close(self) -> None:
        """The scheduler is closed, and told so to all."""
        self.scheduler.close()
        if self.scheduler.busy:
            self.step()
        else:
            self.scheduler = self._new_scheduler()

    def _take(self, update: Update) -> None:
        mine = self.open[update.request]
        mine.text.append(update.text)
        mine.token_ids += update.token_ids
        mine.logprobs += update.logprobs
        if update.completion is None and update.error is None:
            assert (update.text or update.token_ids) and not mine.quiet
            return
        del self.open[update.request]
        if update.error is not None:
            self.counts[type(update.error).__name__] += 1
            assert isinstance(update.error, QueueTimeout | SchedulerClosed) or "a step failed" in str(update.error)
            return
        got = update.completion
        assert got is not None
        self.counts[got.finish_reason] += 1
        told = "".join(mine.text), mine.token_ids, mine.logprobs
        assert told == (("", [], []) if mine.quiet else (got.text, got.token_ids, got.logprobs or []))
        if mine.request.params.logprobs is not None:
            assert got.logprobs is not None and [each.token_id for each in got.logprobs] == got.token_ids
        if got.finish_reason == "timeout":  # as if it had been allowed so many tokens
            if not got.token_ids:
                assert got.text == ""
                return
            params = replace(mine.request.params, max_new_tokens=len(got.token_ids))
            want = self.alone(replace(mine.request, params=params))
            assert (got.text, got.token_ids) == (want.text, want.token_ids)
            return
        want = self.alone(mine.request)
        if got.finish_reason == "interrupted":
            assert want.text.startswith(got.text) and want.token_ids[: len(got.token_ids)] == got.token_ids
            return
        assert (got.text, got.token_ids, got.finish_reason) == (want.text, want.token_ids, want.finish_reason)
        assert got.dropped_messages == want.dropped_messages
        self.counts["reused"] += got.stats.reused_tokens
        self.answered = [*self.answered[-20:], [*mine.request.ids, *got.token_ids]]

    def _told_later(self) -> list[Update]:
        return self.scheduler._queue._updates

    def _conversation(self, turns: int) -> Request:
        said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}] * turns
        params = SamplingParams(seed=turns, max_new_tokens=20, overflow="roll")
        prompt = [*said, {"role": "user", "content": "And now?"}]
        return read_request(self.llm.tokenizer, self.llm.config.vocab_size, self.llm.context, prompt, params)

    def _new_scheduler(self) -> Scheduler:
        return self.llm.scheduler(SEQUENCES, self.tokens, 16, WAITING, PER_TENANT)
