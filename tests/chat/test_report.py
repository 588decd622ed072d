"""What is told of an answer."""

from dataclasses import replace

from bitnet_numba.chat.report import describe
from tests.chat.helpers import toy_conversation


def test_one_token_is_one_token() -> None:
    talk = toy_conversation()
    for _ in talk.ask("Hi"):
        pass
    last = talk.last
    assert last is not None
    one = replace(last.stats, prompt_tokens=3, reused_tokens=2, generated_tokens=1)
    assert describe(replace(last, stats=one), talk).startswith("prefill 1 token (and 2 reused), ")
    assert " | answer 1 token | " in describe(replace(last, stats=one), talk)
    many = replace(one, prompt_tokens=1002, generated_tokens=2)
    assert describe(replace(last, stats=many), talk).startswith("prefill 1,000 tokens (and 2 reused), ")
