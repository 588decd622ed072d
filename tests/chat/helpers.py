"""Conversations and chats over a toy backend."""

from collections.abc import Callable
from typing import Any

from bitnet_numba.chat import display
from bitnet_numba.chat.chat import Chat
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.display import Display
from bitnet_numba.sampling_params import SamplingParams
from tests.engine.toy_backend import tokens_of, toy_engine

EOT = 1999


def toy_conversation(answer: str = "Fine.", context: int = 256, **options: Any) -> Conversation:
    llm, _ = toy_engine([*tokens_of(answer), EOT], context)
    return Conversation(llm, SamplingParams(max_new_tokens=None), **options)


def ask(talk: Conversation, text: str) -> str:
    return "".join(talk.ask(text))


def toy_chat(talk: Conversation | None = None, show_stats: bool = False, markdown: bool = False) -> Chat:
    return Chat(talk or toy_conversation(), Display(markdown), "toy", show_stats)


def before_writing(monkeypatch: Any, call: Callable[[int], None]) -> None:
    """Has `call` called with 1, 2, ... before each piece of a model's text is printed."""
    count, write = 0, display.write

    def counting(text: str) -> None:
        nonlocal count
        count += 1
        call(count)
        write(text)

    monkeypatch.setattr(display, "write", counting)
