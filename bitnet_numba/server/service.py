"""The model behind the server: loaded while the server listens already; who may start answers, and what ends them."""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import Request
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.errors import BitNetError, RequestError, SchedulerClosed, shown
from bitnet_numba.server.answers import Answers
from bitnet_numba.server.engine_loop import EngineLoop
from bitnet_numba.server.errors import ApiError, busy, from_request_error
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.metrics import Metrics
from bitnet_numba.server.settings import Settings

Result = TypeVar("Result")

ENCODERS = 2  # threads that turn texts into tokens
MAX_RETRY_AFTER = 60


class Fields(NamedTuple):
    """The fields that error messages about a request's answers name."""

    prompt: str
    limit: str  # how many tokens an answer may have
    choices: str = "n"  # how many answers there are
    form: str | None = None  # what form the answers have; None: any


class Service:
    """One model that is served. All methods belong to the event loop."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.metrics = Metrics()
        self.created = int(time.time())
        self.draining = False
        self.open = 0  # answers that were admitted and whose responses are not finished
        self._engine: Engine | None = None
        self._engine_loop: EngineLoop | None = None
        self._encoders = ThreadPoolExecutor(ENCODERS, "bitnet_numba encoder")
        self.metrics.gauge("answers_running", "answers that are generated", lambda: self.running)
        self.metrics.gauge("answers_waiting", "answers that wait for their turn", lambda: self.open - self.running)

    async def start(self, load: Callable[[], Engine]) -> None:
        """Loads the model and starts to serve it. Raises BitNetError."""
        loop, settings = asyncio.get_running_loop(), self.settings
        started: asyncio.Future[tuple[Engine, EngineLoop | None]] = loop.create_future()

        def run() -> None:
            try:
                engine = load()

                def open_scheduler() -> Scheduler:
                    return engine.scheduler(
                        settings.max_sequences,
                        settings.tokens,
                        settings.prefill_chunk,
                        max_per_tenant=settings.max_per_key,
                    )

                generates = not engine.config.embeds
                result = engine, EngineLoop(loop, open_scheduler, settings.coalesce) if generates else None
            except BaseException as error:
                tell(started.set_exception, error)
            else:
                tell(started.set_result, result)

        def tell(how: Callable[[Any], None], what: Any) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(lambda: None if started.done() else how(what))

        # A daemon: who ends the server while it compiles kernels need not wait for them.
        threading.Thread(target=run, name="bitnet_numba load", daemon=True).start()
        self._engine, self._engine_loop = await started

    def close(self) -> None:
        """Ends answers that are open with an error, and frees the model."""
        self.draining = True
        if self._engine_loop is not None:
            self._engine_loop.close()
        if self._engine is not None:
            self._engine.close()
        self._encoders.shutdown(wait=False)

    @property
    def status(self) -> str:
        """ok, loading, draining, failed, or hanging: there is work, but no step has ended for a long time."""
        if self.draining:
            return "draining"
        if self._engine is None:
            return "loading"
        if self._engine_loop is None:  # of an embedding model
            return "ok"
        if not self._engine_loop.alive:
            return "failed"
        return "hanging" if self._engine_loop.silent_for > self.settings.hang_timeout else "ok"

    @property
    def running(self) -> int:
        """Answers that are generated now."""
        return self._engine_loop.running if self._engine_loop else 0

    @property
    def engine(self) -> Engine:
        """The model. Raises ApiError while there is none."""
        if self._engine is None:
            raise busy("the model is being loaded", "loading", retry_after=2)
        return self._engine

    def check_model(self, name: str | None) -> str:
        """The name by which a request calls the model. Raises ApiError if it means another one."""
        names = self.settings.models
        if name is None or name in names:
            return name or names[0]
        raise ApiError(
            404, f"there is no model {name!r} here, only {names[0]!r}", param="model", code="model_not_found"
        )

    async def in_encoder(self, work: Callable[[], Result], param: str) -> Result:
        """Runs what takes long with long texts, in a thread. Raises ApiError, naming `param`, if they are invalid."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._encoders, work)
        except RequestError as error:
            raise from_request_error(error, param) from None
        except BitNetError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from None

    @contextlib.asynccontextmanager
    async def answering(
        self,
        exchange: Exchange,
        count: int,
        make: Callable[[], list[Request]],
        fields: Fields,
        priority: int = 0,
        cache_salt: str = "",
        quiet: bool = False,
    ) -> AsyncIterator[Answers]:
        """Starts `count` answers and ends them with the block, or when the client has left, or when time is over.

        make: reads the prompts. priority: lower ones first. cache_salt: computed pages are shared only where it is the
        same, and the key, too. quiet: of each answer, only the end is told. Raises ApiError if the prompts are invalid,
        or if there is no room for more.
        """
        settings = self.settings
        engine_loop = self._admit(count, fields.choices)
        self.open += count
        answers: Answers | None = None
        try:
            requests = await self.in_encoder(make, fields.prompt)
            try:
                tenant = exchange.tenant
                options = QueueOptions(priority, tenant, f"{tenant} {cache_salt}", settings.queue_timeout)
                answers = engine_loop.open(requests, options, quiet, fields.form)
            except SchedulerClosed:
                raise busy("the model is not ready for requests", "unavailable") from None
            except RequestError as error:
                message = str(error).replace("max_new_tokens", fields.limit)
                raise from_request_error(RequestError(message), fields.limit) from None
            opened = answers
            late = ApiError(504, f"the answer took more than {settings.answer_timeout:g} s", code="timeout")

            def stop(error: ApiError) -> None:
                engine_loop.cancel(opened)
                opened.fail(error)

            left = ApiError(499, "the client has left", code="client_left")
            with exchange.deadline(settings.answer_timeout, lambda: stop(late)):
                async with exchange.watching(lambda: stop(left)):
                    yield answers
        finally:
            self.open -= count
            if answers is not None and not answers.ended:
                engine_loop.cancel(answers)

    @contextlib.asynccontextmanager
    async def embedding(self, exchange: Exchange) -> AsyncIterator[Callable[[], ApiError | None]]:
        """Counts a request for embeddings, and gives a function that tells why its work has to end; None: it has not.

        Raises ApiError if there is no room for more.
        """
        settings = self.settings
        if self.draining:
            raise busy("the server is shutting down", "draining", retry_after=5)
        if self.open >= settings.max_sequences + settings.max_waiting:
            raise self._full()
        reasons: list[ApiError] = []
        late = ApiError(504, f"the embeddings took more than {settings.answer_timeout:g} s", code="timeout")
        left = ApiError(499, "the client has left", code="client_left")
        self.open += 1
        try:
            with exchange.deadline(settings.answer_timeout, lambda: reasons.append(late)):
                async with exchange.watching(lambda: reasons.append(left)):
                    yield lambda: reasons[0] if reasons else None
        finally:
            self.open -= 1

    def _full(self) -> ApiError:
        return ApiError(
            429,
            f"the queue is full: {self.open} answers are running or waiting",
            code="queue_full",
            headers={"retry-after": str(self._retry_after())},
        )

    def _admit(self, count: int, field: str) -> EngineLoop:
        """Raises ApiError if `count` more answers cannot be started now; it names `field` if they never can."""
        settings = self.settings
        if self.draining:
            raise busy("the server is shutting down", "draining", retry_after=5)
        if self.engine.config.embeds or self._engine_loop is None:
            raise ApiError(400, "this is an embedding model: use /v1/embeddings", param="model", code="invalid_value")
        if not self._engine_loop.alive:
            raise busy("the model has failed", "engine_failed", retry_after=30)
        if count > settings.most_choices:
            message = f"a request may have at most {settings.most_choices} answers, not {shown(count)}"
            raise ApiError(400, message, param=field, code="invalid_value")
        room = settings.max_sequences + settings.max_waiting - self.open
        if count > room:
            raise self._full()
        return self._engine_loop

    def _retry_after(self) -> int:
        """Seconds after which there may be room: one for each time that all slots are used."""
        return min(MAX_RETRY_AFTER, 1 + self.open // self.settings.max_sequences)
