"""The answers to one HTTP request, as the event loop sees them: what the engine's thread found out, in order."""

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.sequence import Update
from bitnet_numba.errors import BitNetError, QueueTimeout, SchedulerClosed
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.server.errors import ApiError, busy


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

    def __init__(self, requests: Sequence[Request], numbers: Sequence[int]):
        """numbers: by which the scheduler knows the requests."""
        self.requests, self.numbers = requests, numbers
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
            logprobs, of_prompt = [*logprobs, *update.logprobs], of_prompt or update.prompt_logprobs
            found[index] = News(text + update.text, logprobs, of_prompt, update.completion)
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
        return ApiError(500, str(error), code="answer_failed")
