"""Functions and their calls in conversations, whether the template knows of them or not."""

from pathlib import Path
from typing import Any

import pytest

from bitnet_numba.errors import RequestError
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import EOT, HI, TOKENIZER, set_config

TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time <|eot_id|> of day"}}]
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"a": "<|eot_id|>"}'}}
TURNS: list[dict[str, Any]] = [
    *HI,
    {"role": "assistant", "content": None, "tool_calls": [CALL, {**CALL, "id": "c2"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "Noon."},
    {"role": "tool", "tool_call_id": "c9", "content": [{"type": "text", "text": "Midnight."}]},
]
HERMES = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}\n</tool_call>{% endfor %}<|eot_id|>{% endfor %}{# a 'tool' answers #}"
)


def test_a_template_that_knows_no_tools() -> None:
    text = TOKENIZER.apply_chat_template(TURNS)
    call = '{"name": "now", "arguments": {"a": "<|eot_id|>"}}'
    assert text == (
        f"User: Hi.<|eot_id|>Assistant: {call}\n{call}<|eot_id|>"
        "User: now returned: Noon.\nThe function returned: Midnight.<|eot_id|>Assistant: "
    )
    assert TOKENIZER.encode_chat(TURNS).count(EOT) == 3
    assert TOKENIZER.call_tags == ("", "")


def test_the_system_tells_of_tools() -> None:
    text = TOKENIZER.apply_chat_template(HI, tools=TOOLS)
    assert text.startswith('System: You can call these functions:\n{"name": "now"')
    system = [{"role": "system", "content": "Be brief."}, *HI]
    assert TOKENIZER.apply_chat_template(system, tools=TOOLS) == text.replace("System: ", "System: Be brief.\n\n")
    assert TOKENIZER.encode_chat(HI, tools=TOOLS).count(EOT) == 2
    assert TOKENIZER.apply_chat_template(HI, tools=[]) == TOKENIZER.apply_chat_template(HI)


def test_a_template_that_takes_them(folder: Path) -> None:
    tokenizer = Tokenizer.open(set_config(folder, chat_template=HERMES))
    text = tokenizer.apply_chat_template(TURNS, tools=TOOLS)
    assert text.startswith('{"type": "function", "function": {"name": "now"')
    assert '<tool_call>\nnow {"a": "<|eot_id|>"}\n</tool_call>' in text and "tool: Noon.<|eot_id|>" in text
    assert tokenizer.call_tags == ("<tool_call>\n", "\n</tool_call>")
    # Neither descriptions nor arguments end a turn.
    assert tokenizer.encode_chat(TURNS, tools=TOOLS).count(EOT) == len(TURNS)


NO_CALLS = [5, [5], [{}], [{"function": {"name": "f"}}], [{"function": {"name": 1, "arguments": 2}}]]


@pytest.mark.parametrize("calls", NO_CALLS)
def test_calls_that_are_none(calls: Any, folder: Path) -> None:
    turns = [*HI, {"role": "assistant", "content": "", "tool_calls": calls}]
    for tokenizer in (TOKENIZER, Tokenizer.open(set_config(folder, chat_template=HERMES))):
        with pytest.raises(RequestError, match="tool_calls must be"):
            tokenizer.encode_chat(turns)
