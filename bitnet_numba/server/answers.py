"""The answers to one HTTP request, as the event loop sees them: what the engine's thread found out, in order."""

import asyncio
from collections import deque
from collections.abc import Sequence

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.scheduler import Update
from bitnet_numba.errors import BitNetError
from bitnet_numba.server.errors import ApiError, busy


class Answers:
    """One or more answers under way. Created by `EngineLoop.open`.

    The engine's thread calls `put`; everything else belongs to the event loop.
    """

    def __init__(self, requests: Sequence[Request], numbers: Sequence[int]):
        """numbers: by which the scheduler knows the requests."""
        self.requests, self.numbers = requests, numbers
        self.announced = False  # whether the loop has been told of updates that it has not looked at yet
        self.started = False  # whether there has been any update
        self.error: ApiError | None = None  # why they were ended before their time
        self._updates: deque[tuple[int, Update | BitNetError]] = deque()
        self._open = len(requests)
        self._waiter: asyncio.Future[None] | None = None

    @property
    def ended(self) -> bool:
        """Whether every answer has ended, and its end has been taken."""
        return self._open == 0

    def put(self, index: int, update: Update | BitNetError) -> None:
        """Adds what is new for an answer; BitNetError: it has ended with that, as all others do."""
        self._updates.append((index, update))
        self.started = True

    def wake(self) -> None:
        """Tells the task that waits."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def changes(self) -> dict[int, tuple[str, Completion | None]]:
        """Waits for something new: by answer, the text that follows, and the completion of one that has ended.

        Raises ApiError if an answer has failed.
        """
        while not self._updates:
            if self.error is not None:
                raise self.error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        found: dict[int, tuple[str, Completion | None]] = {}
        while self._updates:
            index, update = self._updates.popleft()
            if self.error is not None:
                raise self.error
            if isinstance(update, BitNetError):
                raise busy(str(update), "engine_failed")
            if update.error is not None:
                raise ApiError(500, str(update.error), code="answer_failed")
            before = found[index][0] if index in found else ""
            found[index] = before + update.text, update.completion
            self._open -= update.completion is not None
        return found

    async def completions(self) -> list[Completion]:
        """Waits for all of them, in order. Raises ApiError if one has failed."""
        done: dict[int, Completion] = {}
        while not self.ended:
            for index, (_, completion) in (await self.changes()).items():
                if completion is not None:
                    done[index] = completion
        return [done[index] for index in range(len(self.requests))]

    def fail(self, error: ApiError) -> None:
        """Whoever waits for them gets this error."""
        if self.error is None:
            self.error = error
        self.wake()
