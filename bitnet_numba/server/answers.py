"""The answers to one HTTP request, as the event loop sees them: what the engine's thread found out, in order."""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.sequence import Update
from bitnet_numba.errors import BitNetError, QueueTimeout, RequestError, SchedulerClosed
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.server.errors import ApiError, busy, from_request_error


class News(NamedTuple):
    """What is new of one answer."""

    text: str  # follows the text before
    logprobs: Sequence[TokenLogprob]  # likewise, if they were asked for
    prompt_logprobs: Sequence[TokenLogprob | None]  # likewise; all come at once
    completion: Completion | None  # the whole answer, once it has ended


NOTHING = News("", (), (), None)


class Answers:
    """One or more answers under way. Created by `EngineLoop.open`.

    The engine's thread calls `put`; everything else belongs to the event loop.
    """

    def __init__(self, requests: Sequence[Request], numbers: Sequence[int], form: str | None = None):
        """numbers: by which the scheduler knows the requests. form: the field of the HTTP request that
        prescribes their form, if any."""
        self.requests, self.numbers, self._form = requests, numbers, form
        self.prompt_only = False  # whether only what is told of the prompts is wanted
        self.error: ApiError | None = None  # why they were ended before their time
        self._failed = False  # whether the backend has
        self._updates: deque[tuple[int, Update]] = deque()
        self._open = len(requests)
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether every answer has ended, and its end has been taken."""
        return self._open == 0

    def put(self, index: int, update: Update, failed: bool = False) -> None:
        """Adds what is new for an answer. failed: it has ended because the backend has failed, or was closed."""
        self._failed = self._failed or failed
        self._updates.append((index, update))

    def wake(self) -> None:
        """Tells the task that waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changes(self) -> dict[int, News]:
        """Waits for something new; by answer. Raises ApiError if an answer has failed."""
        while not self._updates:
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found: dict[int, News] = {}
        while self._updates:
            index, update = self._updates.popleft()
            if self.error is not None:
                raise self.error
            if update.error is not None:
                raise self._as_api_error(update.error)
            text, logprobs, of_prompt, _ = found.get(index, NOTHING)
            of_prompt, completion = of_prompt or update.prompt_logprobs, update.completion
            if not self.prompt_only:
                text, logprobs = text + update.text, [*logprobs, *update.logprobs]
            elif completion is not None:
                completion = _without_answer(completion)
            found[index] = News(text, logprobs, of_prompt, completion)
            self._open -= update.completion is not None
        return found

    async def completions(self) -> list[Completion]:
        """Waits for all of them, in order. Raises ApiError if one has failed."""
        done: dict[int, Completion] = {}
        while not self.ended:
            for index, news in (await self.changes()).items():
                if news.completion is not None:
                    done[index] = news.completion
        return [done[index] for index in range(len(self.requests))]

    def fail(self, error: ApiError) -> None:
        """Whoever waits for them gets this error."""
        if self.error is None:
            self.error = error
        self.wake()

    def _as_api_error(self, error: BitNetError) -> ApiError:
        if isinstance(error, QueueTimeout):
            return busy(str(error), "queue_timeout", retry_after=5)
        if isinstance(error, SchedulerClosed):
            return busy("the server is shutting down", "shutting_down")
        if self._failed:
            return busy(str(error), "engine_failed")
        if isinstance(error, RequestError):  # the form cannot be followed, which shows only now
            return from_request_error(error, self._form)
        return ApiError(500, str(error), code="answer_failed")


def _without_answer(completion: Completion) -> Completion:
    """The completion as if no token had been allowed."""
    stats = replace(completion.stats, generated_tokens=0, decode_seconds=0.0)
    logprobs: list[TokenLogprob] | None = None if completion.logprobs is None else []
    return replace(completion, text="", token_ids=[], finish_reason="length", stats=stats, logprobs=logprobs)
