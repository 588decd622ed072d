"""Chats through the engine: what a turn keeps in the context, answers that are continued, and what ends one."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.backends.protocol import Backend
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import RequestError, TokenizerError
from bitnet_numba.sampling import SamplingParams
from bitnet_numba.text.tokenizer import Tokenizer
from tests.engine.toy_backend import CONFIG, TOKENIZER, ToyBackend, tokens_of, toy_engine

EOT, RESERVED = 1999, 1992
HI = [{"role": "user", "content": "Hi."}]


def engine_with(template: str | None, script: list[int]) -> tuple[Engine, ToyBackend]:
    backend = ToyBackend(script)
    tokenizer = Tokenizer(TOKENIZER._backend, template, {"eos_token": "<|eot_id|>"})
    as_backend: Backend = backend  # type: ignore[assignment]
    return Engine(as_backend, tokenizer, CONFIG, 500), backend


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, " I am fine."),
        ("{% for m in messages %}{{ m.content[:9] }}<|eot_id|>{% endfor %}", "I am fine, thank you."),
        (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|eot_id|>{% endfor %}",
            "<think>Hm.</think>Yes.",
        ),
        ("{% for m in messages %}\ufdd1{{ m.content }}<|eot_id|>{% endfor %}", "Fine \ufdd0."),
    ],
    ids=["plain", "shortened", "thinking", "noncharacters"],
)
def test_each_turn_is_the_templates_text(template: str | None, said: str) -> None:
    llm, _ = engine_with(template, [*tokens_of(said), EOT])
    conversation = Conversation(llm, SamplingParams())
    for question in ("How are you?", "And now?", "Well?"):
        assert "".join(conversation.ask(question)) == said
    expected = [{"role": m["role"], "content": m["content"]} for m in conversation.messages]
    ids = llm.tokenizer.encode_chat(conversation.messages)
    text = llm.tokenizer.apply_chat_template(expected)
    assert llm.tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>" + text
    if template is None:
        assert "  " not in text


def test_plain_turns_compute_only_what_is_new() -> None:
    llm, backend = engine_with(None, [*tokens_of(" I am fine."), *tokens_of("\nUser:")])
    conversation = Conversation(llm, SamplingParams())
    for question in ("How are you?", "And now?"):
        assert "".join(conversation.ask(question)) == " I am fine."
    new = TOKENIZER.encode("\nUser: And now?\nAssistant:", add_bos=False)
    assert backend.prefilled[1] == len(new)


@pytest.mark.parametrize(
    "stop", ["<|reserved_special_token_0|>", "<|reserved_special_token_0|>\n", ["x", " <|reserved_special_token_0|>"]]
)
def test_a_special_token_as_stop_string_ends_an_answer(stop: Any) -> None:
    assert TOKENIZER.encode("<|reserved_special_token_0|>", add_bos=False) == [RESERVED]
    llm, _ = toy_engine([*tokens_of("Fine."), RESERVED, *tokens_of("never"), EOT])
    completion = llm.generate(HI, stop=stop)
    assert (completion.text, completion.finish_reason) == ("Fine.", "stop")
    assert completion.token_ids == tokens_of("Fine.")
    assert llm.generate(HI).text == "Fine.never"


def test_an_answer_that_stands_last_is_continued() -> None:
    llm, _ = toy_engine([*tokens_of(" a time"), EOT])
    completion = llm.generate([*HI, {"role": "assistant", "content": "Once upon"}])
    assert completion.text == " a time"
    text = "<|begin_of_text|>User: Hi.<|eot_id|>Assistant: Once upon"
    assert completion.stats.prompt_tokens == len(TOKENIZER.encode(text))


def test_a_token_beyond_the_vocabulary_is_refused_where_it_stands() -> None:
    tokenizer = Tokenizer.open(Path(__file__).parents[1] / "golden" / "tokenizer", 1999)
    as_backend: Backend = ToyBackend(tokens_of("a"))  # type: ignore[assignment]
    llm = Engine(as_backend, tokenizer, replace(CONFIG, vocab_size=1999), 500)
    assert llm.generate("x", max_new_tokens=1).text == "a"
    with pytest.raises(RequestError, match="token id 1999 is not in the vocabulary of 1999"):
        llm.generate("x<|eot_id|>")


def test_without_a_usable_template_only_chats_are_refused() -> None:
    llm, _ = engine_with("{% nonsense %}", tokens_of("a"))
    assert llm.generate("x", max_new_tokens=1).text == "a"
    with pytest.raises(TokenizerError, match="chat template: .*nonsense"):
        llm.generate(HI)
