"""Engine, a loaded model, answers prompts: alone, as a stream, or together."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, overload

import numpy as np

from bitnet_numba.engine.asynchronous import AsyncStream, results
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.open_model import OpenModel
from bitnet_numba.engine.queue_options import QueueOptions
from bitnet_numba.engine.request import (
    Prompt,
    Request,
    check_names,
    is_list,
    positive_integer,
    read_params,
    read_request,
)
from bitnet_numba.engine.scheduler import MAX_SEQUENCES
from bitnet_numba.engine.session import Stream
from bitnet_numba.errors import BitNetError, RequestError, shown
from bitnet_numba.sampling_params import SamplingOverrides, SamplingParams
from bitnet_numba.text.chat_template import Message

if TYPE_CHECKING:
    from typing_extensions import Unpack  # Python 3.10 has none of its own

ALL_PROMPTS = 1 << 40  # prompt tokens a round of `generate_batch`: nobody waits for the next piece of an answer there


class Engine(OpenModel):
    """A loaded model. Created by `load`.

    Any thread may call it. Answers under way at the same time take turns, token by token; `scheduler` and
    `generate_batch` compute them together, which is faster. After os.fork, only the reference works in the child, and
    only where NumPy does (as on Linux).
    """

    @overload
    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion: ...

    @overload
    def generate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, n: int, **overrides: "Unpack[SamplingOverrides]"
    ) -> list[Completion]: ...

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion | list[Completion]:
        """The answer to a prompt; arguments and errors as for `stream`.

        n: gives a list of so many answers, which are computed together; the first is the one without `n`, and each
        later one has the next seed. Their prompt is computed once, but for its last page.
        """
        check_names("generate", overrides, ["n"])
        return self._answers(prompt, read_params("generate", params, overrides), n)

    def _answers(self, prompt: Prompt, params: SamplingParams, n: int | None) -> Completion | list[Completion]:
        """The answer to a prompt; with `n`, a list of that many answers."""
        if n is None:
            return self._stream(prompt, params).result()
        count = positive_integer("n", n, MAX_SEQUENCES)
        self._check_generates()
        request = read_request(self.tokenizer, self.config.vocab_size, self.context, prompt, params)
        return self._answer_together(request.several(count))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **overrides: "Unpack[SamplingOverrides]"
    ) -> Stream:
        """The answer to a prompt, in pieces of text as they are generated.

        prompt: a text to continue, token ids, or chat messages [{"role": "user", "content": "..."}, ...].
        params: how it is generated; None: the defaults of SamplingParams, which are greedy.
        overrides: fields of SamplingParams by name, which go before `params`: temperature=0.8, max_new_tokens=50.

        Raises RequestError or ContextFull immediately if the request is invalid. Nothing is cached between prompts, so
        an answer depends on its arguments alone; use `session` for conversations.
        """
        return self._stream(prompt, read_params("stream", params, overrides))

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: int,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion]: ...

    def chat(
        self,
        messages: str | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion | list[Completion]:
        """The answer to a user's message, or to a conversation, as the model's maker recommends to generate it.

        messages: a text, which becomes one message of the user, or messages as for `stream`.
        params: None: `self.sampling`, what the model's folder recommends; if it recommends nothing, greedy.
        n: gives a list of so many answers, as for `generate`.

        Otherwise as `generate`. `stream(messages, llm.sampling)` gives the same answer in pieces.
        """
        check_names("chat", overrides, ["n"])
        checked = read_params("chat", params, overrides, self.sampling)
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}] if messages else ""
        elif not is_list(messages) or (len(messages) and not isinstance(messages[0], Mapping)):
            raise RequestError(f"chat answers one text or one list of messages, not {shown(messages)}")
        return self._answers(messages, checked, n)

    @overload
    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: None = None,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion: ...

    @overload
    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion]: ...

    async def agenerate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> Completion | list[Completion]:
        """`generate` for asyncio: `n` as there, all other arguments and errors as for `astream`."""
        check_names("agenerate", overrides, ["n"])
        checked = read_params("agenerate", params, overrides)
        options = QueueOptions(priority, "", cache_salt, queue_timeout, timeout)
        several = "call agenerate for each"
        if n is None:
            return await self._astream(prompt, checked, options, several, quiet=True).result()
        each = checked.several(positive_integer("n", n, MAX_SEQUENCES))
        return await results([self._astream(prompt, own, options, several, quiet=True) for own in each])

    def astream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        queue_timeout: float | None = None,
        timeout: float | None = None,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> AsyncStream:
        """`stream` for asyncio: `async for piece in llm.astream(prompt): ...`.

        priority, cache_salt, queue_timeout, timeout: see `QueueOptions`; the times count from the first piece that is
        asked for.

        A worker thread computes, so the event loop is never held up. Requests under way at the same time share one
        scheduler (see `scheduler`), which has memory only while there are any. A task that is cancelled ends its
        answer after the step under way. `params` and errors are those of `stream`; invalid parameters raise
        immediately, an invalid prompt at the first piece, and QueueTimeout there after `queue_timeout`.
        """
        checked = read_params("astream", params, overrides)
        options = QueueOptions(priority, "", cache_salt, queue_timeout, timeout)
        return self._astream(prompt, checked, options, "call astream for each")

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        n: None = None,
        max_sequences: int = 64,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion]: ...

    @overload
    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        n: int,
        max_sequences: int = 64,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[list[Completion]]: ...

    def generate_batch(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams | None] | None = None,
        *,
        n: int | None = None,
        max_sequences: int = 64,
        **overrides: "Unpack[SamplingOverrides]",
    ) -> list[Completion] | list[list[Completion]]:
        """The answers to several prompts, in the order of the prompts, computed as a batch.

        params: for all prompts, or a list with one for each; None is greedy. `overrides` go before all of them.
        n: gives a list of so many answers to each prompt, as for `generate`.
        max_sequences: how many run at once; the others wait.

        Raises RequestError or ContextFull, naming the prompt's index, before anything is computed; BackendError if
        memory is insufficient or a prompt produces numbers that are not finite.
        """
        self._check_generates()
        method = "generate_batch"
        check_names(method, overrides, ["n", "max_sequences"])
        count = 1 if n is None else positive_integer("n", n, MAX_SEQUENCES)
        if not is_list(prompts) or isinstance(prompts, np.ndarray):
            raise RequestError(f"prompts must be a list of prompts, not {shown(prompts)}")
        max_sequences = positive_integer("max_sequences", max_sequences, MAX_SEQUENCES)
        # Here, so that a mistake is not put down to the first prompt, and an iterator of stop strings is read once.
        checked = read_params(method, None, overrides)
        same = {name: getattr(checked, name) for name in overrides}
        if isinstance(params, SamplingParams) or params is None:
            each: Iterable[SamplingParams | None] = itertools.repeat(read_params(method, params, same), len(prompts))
        elif not is_list(params):
            raise RequestError(f"params must be SamplingParams or a list of them, not {shown(params)}")
        elif len(params) != len(prompts):
            raise RequestError(f"there are {len(prompts)} prompts but {len(params)} sampling parameters")
        else:
            each = params
        requests: list[Request] = []
        vocab, several = self.config.vocab_size, "list each by itself"
        last: SamplingParams | None = None
        for i, (prompt, own) in enumerate(zip(prompts, each, strict=True)):
            with _naming_prompt(i):
                if own is None or own is not last:  # mostly they are one and the same
                    last, checked = own, read_params(method, own, same)
                requests += read_request(self.tokenizer, vocab, self.context, prompt, checked, several).several(count)
        answers = self._answer_together(requests, max_sequences, count) if requests else []
        return answers if n is None else [answers[i : i + count] for i in range(0, len(answers), count)]

    def _answer_together(
        self, requests: Sequence[Request], max_sequences: int = 64, of_each: int | None = None
    ) -> list[Completion]:
        """The answers to several requests, up to `max_sequences` at once.

        of_each: how many requests each prompt has, so that errors can name its place; None: all are of one prompt.
        """
        completions: dict[int, Completion] = {}
        of_each = of_each or len(requests)
        with self.scheduler(min(max_sequences, len(requests)), prefill_chunk=ALL_PROMPTS) as scheduler:
            ids = []
            for i, request in enumerate(requests):
                with _naming_prompt(i // of_each):
                    ids.append(scheduler.add_request(request, quiet=True))
            while scheduler.busy:
                for update in scheduler.step():
                    if update.error is not None:
                        with _naming_prompt(ids.index(update.request) // of_each):
                            raise update.error
                    if update.completion is not None:
                        completions[update.request] = update.completion
        return [completions[i] for i in ids]

    def _stream(self, prompt: Prompt, params: SamplingParams) -> Stream:
        self._check_generates()
        request = read_request(self.tokenizer, self.config.vocab_size, self.context, prompt, params)
        session = self._remember(self._new_session())

        def ended() -> None:
            context = session.release()
            if context is not None:
                self._backend.give_back(context)

        return session.stream_request(request, ended)

    def _astream(
        self, prompt: Prompt, params: SamplingParams, options: QueueOptions, several: str, quiet: bool = False
    ) -> AsyncStream:
        self._check_generates()

        def read() -> Request:
            self._check_generates()
            return read_request(self.tokenizer, self.config.vocab_size, self.context, prompt, params, several)

        return AsyncStream(self._async_worker, self.scheduler, read, options, quiet)


@contextlib.contextmanager
def _naming_prompt(index: int) -> Iterator[None]:
    try:
        yield
    except BitNetError as error:
        raise type(error)(f"prompt {index}: {error}") from None
