"""A conversation with a model: its messages, a session whose context each turn extends, and lines that describe it."""

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.request import GenerationOptions, Prompt
from bitnet_numba.engine.session import Stream
from bitnet_numba.errors import RequestError
from bitnet_numba.sampling import SamplingParams

FORMAT = 1  # of saved conversations

NO_TEMPLATE = "this model has no chat template: turns are plain 'User: ...', 'Assistant: ...'; see also --raw"


class Conversation:
    """Turns of user and assistant. In raw mode there are no turns: the model continues each text on its own."""

    def __init__(self, engine: Engine, options: GenerationOptions, system: str = "", raw: bool = False):
        self.engine = engine
        self.options = options
        self.system = system
        self.raw = raw
        self.messages: list[dict[str, Any]] = []  # without the system message
        self.last: Completion | None = None
        self.session = engine.session()

    def ask(self, text: str) -> Iterator[str]:
        """Yields the answer's text; at the end, sets `last` and adds question and answer to `messages`.

        If the iterator is closed early, the text so far counts as the answer. Raises RequestError or ContextFull, and
        adds nothing, if the question cannot be answered.
        """
        prompt: Prompt = text
        question = {"role": "user", "content": text}
        if not self.raw:
            if not text.strip():
                raise RequestError("the prompt is empty")
            system = [{"role": "system", "content": self.system}] if self.system else []
            prompt = [*system, *self.messages, question]
        stream = self.session.stream(prompt, self.options.params, self.options.max_new_tokens, self.options.stop)
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
        """Writes the conversation as JSON. Raises RequestError, and changes nothing, if it cannot.

        An existing file is replaced only if it is a saved conversation.
        """
        if path.exists():
            _read(path)
        messages = [{"role": message["role"], "content": message["content"]} for message in self.messages]
        saved = {"bitnet_numba_chat": FORMAT, "system": self.system, "messages": messages}
        partial = path.with_name(path.name + ".part")
        try:
            partial.write_text(json.dumps(saved, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RequestError(f"{path} cannot be written: {error.strerror}") from None

    def load(self, path: Path) -> None:
        """Continues a saved conversation. Raises RequestError, and changes nothing, if the file is not one."""
        saved = _read(path)
        self.reset()
        self.system = saved["system"]
        self.messages = saved["messages"]


def _read(path: Path) -> dict[str, Any]:
    """Reads a saved conversation. Raises RequestError if the file is missing or is not one."""
    try:
        saved = json.loads(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        saved = None
    if not (isinstance(saved, dict) and saved.get("bitnet_numba_chat") == FORMAT and _is_text(saved.get("system"))):
        raise RequestError(f"{path} is not a saved conversation")
    messages = saved.get("messages")
    if not isinstance(messages, list) or len(messages) % 2:
        raise RequestError(f"{path} is not a saved conversation")
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        if not (isinstance(message, dict) and message.get("role") == role and _is_text(message.get("content"))):
            raise RequestError(f"{path}: message {i + 1} is not a message of role {role}")
    messages = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"system": saved["system"], "messages": messages}


def _is_text(value: object) -> bool:
    return isinstance(value, str)


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
