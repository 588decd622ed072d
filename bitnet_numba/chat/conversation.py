"""A conversation with a model: its messages, a session whose context each turn extends, and lines that describe it."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from bitnet_numba.chat.saved import read_conversation, well_formed, write_conversation
from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import Prompt
from bitnet_numba.engine.session import Stream
from bitnet_numba.errors import RequestError
from bitnet_numba.sampling_params import SamplingParams

NO_TEMPLATE = "this model has no chat template: turns are plain 'User: ...', 'Assistant: ...'; see also --raw"


class Conversation:
    """Turns of user and assistant. In raw mode there are no turns: the model continues each text on its own."""

    def __init__(self, engine: Engine, params: SamplingParams, system: str = "", raw: bool = False):
        self.engine = engine
        self.params = params
        self.system = well_formed(system)
        self.raw = raw
        self.messages: list[dict[str, Any]] = []  # without the system message
        self.last: Completion | None = None
        self.session = engine.session()
        self.session.pauses = engine.backend != "cuda"  # a GPU has read a prompt before anyone can stop it

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer's text; at the end, sets `last` and adds question and answer to `messages`.

        Also yields "" between the parts of a long prompt, where closing the iterator loses nothing. If it is closed
        early, the text so far counts as the answer. Raises RequestError or ContextFull, and adds nothing, if the
        question cannot be answered.
        """
        text = well_formed(text)
        prompt: Prompt = text
        question = {"role": "user", "content": text}
        if not self.raw:
            if not text.strip():
                raise RequestError("the prompt is empty")
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = [*system, *self.messages, question]
        stream = self.session.stream(prompt, self.params)
        return self._answer(stream, question)

    def _answer(self, stream: Stream, question: dict[str, Any]) -> Iterator[str]:
        failed = False
        try:
            with closing(stream):
                yield from stream
        except Exception:
            failed = True
            raise
        finally:
            self.last = stream.completion
            if self.last is not None and not failed and not self.raw:
                self._remember(question, self.last)

    def _remember(self, question: dict[str, Any], completion: Completion) -> None:
        if completion.finish_reason == "interrupted" and not completion.text:
            return
        # The generated ids, so that the next turn finds them in the context.
        answer = {"role": "assistant", "content": completion.text, "token_ids": completion.token_ids}
        self.messages += [question, answer]

    def undo(self) -> str | None:
        """Removes the last question and answer; returns the question, or None if there is none."""
        if not self.messages:
            return None
        del self.messages[-1]
        return str(self.messages.pop()["content"])

    def reset(self) -> None:
        """Removes all messages but the system message."""
        self.messages.clear()
        self.session.clear()
        self.last = None

    def save(self, path: Path) -> None:
        """Writes the conversation to a file, see `saved.write_conversation`. Raises RequestError if it cannot."""
        write_conversation(path, self.system, self.messages)

    def load(self, path: Path) -> None:
        """Continues a saved conversation. Raises RequestError, and changes nothing, if the file is not one."""
        system, messages = read_conversation(path)
        self.reset()
        self.system, self.messages = system, messages


def sampling_line(params: SamplingParams) -> str:
    """The sampling parameters in words."""
    if params.temperature == 0:
        line = "always the most likely token (temperature 0)"
    else:
        names = ("temperature", "top_p", "top_k", "min_p")
        line = ", ".join(f"{name.replace('_', '-')} {getattr(params, name):g}" for name in names)
    return f"{line}, repetition-penalty {params.repetition_penalty:g}"


def describe(completion: Completion, conversation: Conversation) -> str:
    """Speed, context and memory of an answer, in one line."""
    stats, session = completion.stats, conversation.session
    if not stats.generated_tokens:
        return f"stopped before the answer began | context {session.held:,}/{session.capacity:,}"
    prefill = f"prefill {stats.prompt_tokens - stats.reused_tokens:,} tokens"
    if stats.reused_tokens:
        prefill += f" (and {stats.reused_tokens:,} reused)"
    decode = f"answer {stats.generated_tokens:,} tokens"
    if stats.generated_tokens > 1:
        decode += f", {stats.tokens_per_second:,.1f} tokens/s"
    memory = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:,.1f} MB" for name, size in stats.memory.items())
    return (
        f"{prefill}, {stats.prefill_tokens_per_second:,.1f} tokens/s | {decode} | "
        f"context {session.held:,}/{session.capacity:,} | {memory}"
    )
