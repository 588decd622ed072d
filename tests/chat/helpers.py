"""Conversations over a toy backend."""

from typing import Any

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.sampling import SamplingParams
from tests.engine.toy_backend import tokens_of, toy_engine

EOT = 1999


def toy_conversation(answer: str = "Fine.", context: int = 256, **options: Any) -> Conversation:
    llm, _ = toy_engine([*tokens_of(answer), EOT], context)
    return Conversation(llm, SamplingParams(max_new_tokens=None), **options)


def ask(talk: Conversation, text: str) -> str:
    return "".join(talk.ask(text))
