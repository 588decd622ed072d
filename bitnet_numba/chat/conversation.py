"""A conversation with a model: its messages, and a session whose context each turn extends."""

import contextlib
import secrets
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from bitnet_numba.chat.files import well_formed
from bitnet_numba.chat.saved import export_markdown, read_conversation, write_conversation
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import Prompt, Request, read_request
from bitnet_numba.errors import ContextFull, RequestError
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.text.thoughts import ThoughtReader, split_thought

NO_TEMPLATE = "this model has no chat template: turns are plain 'User: ...', 'Assistant: ...'; see also --raw"
# Of the context, this part more than needed is freed when old exchanges have to go: what stays is computed anew then,
# which is not to happen at every turn.
FREED_SHARE = 4

Message = dict[str, Any]
Kind = Literal["new", "replacing", "continuing"]


class Conversation:
    """Turns of user and assistant. In raw mode there are no turns: the model continues each text on its own.

    When the context is full, the model no longer reads the oldest exchanges; they stay in `messages`.
    """

    def __init__(self, engine: Engine, params: SamplingParams, system: str = "", raw: bool = False):
        self.engine = engine
        self.params = self.first_params = params  # `params` as /set changes them
        self.system = well_formed(system)
        self.raw = raw
        self.messages: list[Message] = []  # without the system message
        self.unread = 0  # of `messages`, from the first on: they do not fit the context any more
        self.prompt_tokens = 0  # of the question that is being answered, with all that goes before it
        self.last: Completion | None = None
        self.can_continue = False  # whether the last answer was cut
        self.thoughts: ThoughtReader | None = None  # of the answer under way; None if the model marks none
        self._text = ""  # raw: what was last asked
        self._ids: list[int] = []  # the last prompt and answer as the model has them; none after `load`
        self.session = engine.session()
        self.session.pauses = engine.backend != "cuda"  # a GPU has read a prompt before anyone can stop it

    @property
    def question(self) -> str | None:
        """What was asked last; None if nothing was."""
        if self.raw:
            return self._text or None
        return str(self.messages[-2]["content"]) if self.messages else None

    def ask(self, text: str, replacing: bool = False) -> Iterator[str]:
        """Yields the answer's text; at the end, sets `last` and adds question and answer to `messages`.

        replacing: they take the place of the last question and answer.

        Also yields "" between the parts of a long prompt, where closing the iterator loses nothing. If it is closed
        early, the text so far counts as the answer; if there is none, everything stays as it was. Raises RequestError
        or ContextFull, and changes nothing, if the question cannot be answered.
        """
        text = well_formed(text)
        if self.raw:
            return self._answer(self._read(text, self.params), text, "new")
        if not text.strip():
            raise RequestError("the prompt is empty")
        return self._ask(text, "replacing" if replacing and self.messages else "new", self.params)

    def ask_again(self, other_seed: bool = False) -> Iterator[str]:
        """As `ask`, for the last question; other_seed: with a random seed even if `params` has one."""
        text = self.question
        if text is None:
            raise RequestError("there is no question yet")
        params = replace(self.params, seed=secrets.randbits(32)) if other_seed else self.params
        if self.raw:
            return self._answer(self._read(text, params), text, "new")
        return self._ask(text, "replacing", params)

    def go_on(self) -> Iterator[str]:
        """As `ask`, for the rest of an answer that was cut, which is added to it."""
        if not self.can_continue:
            raise RequestError("there is no answer that was cut")
        return self._answer(self._rest(), self.question or "", "continuing")

    def _rest(self) -> Request:
        """The request for what follows the tokens of the last answer, if these are known and leave room."""
        room = self.session.capacity // FREED_SHARE
        if self._ids and (self.raw or len(self._ids) + room <= self.session.capacity):
            request = self._read(self._ids, replace(self.params, thinking=None))
            return request if self.raw else replace(request, stop=request.stop + self.engine.tokenizer.chat_stop)
        return self._fit(self.messages, self.params)

    def _ask(self, text: str, kind: Kind, params: SamplingParams) -> Iterator[str]:
        before = self.messages[:-2] if kind == "replacing" else self.messages
        request = self._fit([*before, {"role": "user", "content": text}], params)
        return self._answer(request, text, kind)

    def _read(self, prompt: Prompt, params: SamplingParams, capacity: int | None = None) -> Request:
        tokenizer, vocab_size = self.engine.tokenizer, self.engine.config.vocab_size
        return read_request(tokenizer, vocab_size, capacity or self.session.capacity, prompt, params)

    def _fit(self, messages: list[Message], params: SamplingParams) -> Request:
        """The request that these messages make, without as many of the oldest exchanges as have to go."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        start = min(self.unread, (len(messages) - 1) // 2 * 2)
        turns, params = [*system, *messages[start:]], replace(params, overflow="roll")
        capacity = self.session.capacity
        request = self._read(turns, params, capacity)
        if request.dropped_messages:
            with contextlib.suppress(ContextFull):  # the last exchange alone needs more
                request = self._read(turns, params, capacity - capacity // FREED_SHARE)
        self.unread = start + request.dropped_messages
        return request

    def _answer(self, request: Request, question: str, kind: Kind) -> Iterator[str]:
        stream = self.session.stream_request(request)
        self.prompt_tokens = len(request.ids)
        self.thoughts = None if self.raw else self.engine.tokenizer.thoughts(self.params.thinking)
        if kind == "continuing" and self.thoughts is not None:
            begun = self.messages[-1]["content"]
            if self._ids:
                self.thoughts.push(begun)
            else:  # of a file: the model does not go on with the prompt that the answer was for
                self.thoughts = self.engine.tokenizer.thoughts(begun=begun)

        def pieces() -> Iterator[str]:
            failed = False
            try:
                with closing(stream):
                    yield from stream
            except Exception:
                failed = True
                raise
            finally:
                self.last = stream.completion
                if self.last is not None and not failed:
                    self._remember(request, question, kind, self.last)

        return pieces()

    def _remember(self, request: Request, question: str, kind: Kind, completion: Completion) -> None:
        if completion.finish_reason == "interrupted" and not completion.text:
            return
        self.can_continue = completion.finish_reason != "stop"
        self._ids = [*request.ids, *completion.token_ids]
        if self.raw:
            self._text = question
            return
        # The generated ids, so that the next turn finds them in the context.
        answer: Message = {"role": "assistant", "content": completion.text, "token_ids": completion.token_ids}
        if kind == "continuing":
            begun = self.messages.pop()
            answer["content"] = begun["content"] + completion.text
            answer["token_ids"] = [*begun["token_ids"], *completion.token_ids] if "token_ids" in begun else None
            self.messages.append(answer)
            return
        if kind == "replacing":
            del self.messages[-2:]
        self.messages += [{"role": "user", "content": question}, answer]

    def undo(self) -> str | None:
        """Removes the last question and answer; returns the question, or None if there is none."""
        if not self.messages:
            return None
        self.can_continue = False
        del self.messages[-1]
        question = str(self.messages.pop()["content"])
        self.unread = min(self.unread, len(self.messages))
        return question

    def reset(self) -> None:
        """Removes all messages but the system message."""
        self.messages.clear()
        self.session.clear()
        self.unread, self._ids = 0, []
        self.last, self.can_continue = None, False

    def save(self, path: Path) -> None:
        """Writes the conversation to a file, see `saved.write_conversation`. Raises RequestError if it cannot."""
        write_conversation(path, self.system, self.messages)

    def export(self, path: Path, title: str) -> None:
        """Writes the conversation as Markdown, see `saved.export_markdown`. Raises RequestError if it cannot."""
        turns = [(message["role"], *self.split(message)) for message in self.messages]
        export_markdown(path, title, self.system, turns)

    def split(self, message: Message) -> tuple[str, str]:
        """The thought and the rest of a message; "" for a thought that is not there, or not marked as models do."""
        content = str(message["content"])
        if self.raw or message["role"] != "assistant" or self.engine.tokenizer.thoughts() is None:
            return "", content
        return split_thought(content)

    def load(self, path: Path) -> None:
        """Continues a saved conversation. Raises RequestError, and changes nothing, if the file is not one."""
        system, messages = read_conversation(path)
        self.reset()
        self.system, self.messages = system, messages
        self.can_continue = bool(messages)  # the file does not say whether the last answer was cut
