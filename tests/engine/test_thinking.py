"""The switch for thinking: what the template gets, and what is said where it has none."""

import numpy as np
import pytest

from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import RequestError
from bitnet_numba.sampling_params import SamplingParams
from tests.engine.test_chats import EOT, HI, engine_with
from tests.engine.toy_backend import tokens_of

SWITCH = (
    "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1].lstrip('\n') }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# Of a model that always thinks: its tag is the template's.
ALWAYS = SWITCH.partition("{% if enable")[0] + "<think>\n{% endif %}"


def thinking_engine(template: str = SWITCH, said: str = "<think>\nHm.\n</think>\n\nYes.") -> Engine:
    return engine_with(template, [*tokens_of(said), EOT])[0]


def test_the_template_gets_the_switch() -> None:
    llm = thinking_engine()
    texts = [llm.tokenizer.apply_chat_template(HI, thinking=thinking) for thinking in (None, True, False)]
    assert texts[0] == texts[1] == "user: Hi.<|eot_id|>assistant: "
    assert texts[2] == texts[0] + "<think>\n\n</think>\n\n"
    prompts = [llm.chat(HI, thinking=thinking).stats.prompt_tokens for thinking in (None, True, False)]
    assert prompts[0] == prompts[1] < prompts[2]
    with llm.session() as session:
        assert session.generate(HI, thinking=False).stats.prompt_tokens == prompts[2]
    (batched,) = llm.generate_batch([HI], SamplingParams(thinking=False))
    assert batched.stats.prompt_tokens == prompts[2]


def test_a_template_without_the_switch() -> None:
    llm = thinking_engine(ALWAYS)
    for thinking in (True, False):
        with pytest.raises(RequestError, match=r"^this model's chat template has no switch for thinking"):
            llm.chat(HI, thinking=thinking)
    llm.chat(HI)


@pytest.mark.parametrize("prompt", ["Hi.", [5, 6], np.array([5, 6])], ids=["text", "ids", "array"])
def test_only_conversations_have_thoughts(prompt: object) -> None:
    with pytest.raises(RequestError, match="thinking is for conversations, a list of messages; this prompt is none"):
        thinking_engine().generate(prompt, thinking=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1, "on", 0.0, [True]])
def test_values_that_are_no_switch(value: object) -> None:
    with pytest.raises(RequestError, match="thinking must be True, False or None, not"):
        SamplingParams(thinking=value)  # type: ignore[arg-type]
    tokenizer = thinking_engine().tokenizer
    for method in (tokenizer.apply_chat_template, tokenizer.encode_chat):
        with pytest.raises(RequestError, match="thinking must be True, False or None, not"):
            method(HI, thinking=value)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="thinking must be True, False or None, not"):
        tokenizer.thoughts(value)  # type: ignore[arg-type]


def test_a_beginning_that_is_no_text() -> None:
    with pytest.raises(RequestError, match=r"begun must be the text of an answer, or None, not \[\]"):
        thinking_engine().tokenizer.thoughts(begun=[])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("template", "thinking", "opened"), [(SWITCH, None, False), (SWITCH, False, False), (ALWAYS, None, True)]
)
def test_who_begins_the_thought(template: str, thinking: bool | None, opened: bool) -> None:
    reader = thinking_engine(template).tokenizer.thoughts(thinking)
    assert reader is not None
    assert reader.push("Hm.\n</think>Yes.") == (("Hm.", "Yes.") if opened else ("", "Hm.\n</think>Yes."))


def test_models_that_mark_no_thoughts() -> None:
    assert engine_with(None, [EOT])[0].tokenizer.thoughts() is None
