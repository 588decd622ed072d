"""Chat templates: where they are found, what they see, and the sandbox that bounds them."""

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import RequestError, TokenizerError
from bitnet_numba.text import template_sandbox
from bitnet_numba.text.chat_template import ChatTemplate
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import HI, TOKENIZER, set_config


@pytest.mark.parametrize(
    "template",
    [
        "T:{{ messages[0]['content'] }}",
        {"default": "T:{{ messages[0]['content'] }}", "tools": "no"},
        [{"name": "tools", "template": "no"}, {"name": "default", "template": "T:{{ messages[0]['content'] }}"}],
    ],
    ids=["text", "object", "list"],
)
def test_all_forms_of_stored_templates(folder: Path, template: Any) -> None:
    assert Tokenizer.open(set_config(folder, chat_template=template)).apply_chat_template(HI) == "T:Hi."


def test_a_template_file_comes_first(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("F:{{ messages[0]['content'] }}")
    assert Tokenizer.open(folder).apply_chat_template(HI) == "F:Hi."


def test_without_a_template_turns_are_plain(folder: Path) -> None:
    tokenizer = Tokenizer.open(set_config(folder, chat_template=None))
    assert not tokenizer.has_chat_template and TOKENIZER.has_chat_template
    assert tokenizer.apply_chat_template(HI) == "User: Hi.\nAssistant:"
    assert tokenizer.chat_stop == ("\nUser:",) and TOKENIZER.chat_stop == ()


def test_template_helpers_as_hugging_face_has_them() -> None:
    source = (
        "{%- for m in messages %}\n    {%- if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}\n{%- endfor %}"
        "{{ strftime_now('%Y') | length }}{{ eos_token }}{{ tools is none }}"
    )
    messages = [{"role": "user", "content": "\u00e9<&"}, *HI]
    rendered = ChatTemplate(source, {"eos_token": "</s>"}).render(messages)
    assert rendered == '{"role": "user", "content": "\u00e9<&"}4</s>True'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ raise_exception.__globals__.json.decoder }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
        ("{% for i in range(10**9) %}{% endfor %}", "powers are not allowed"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{{ 'a' * 100000000000 }}", "a value is too long"),
        ("{{ 100000000000 * [1] }}", "a value is too long"),
        ("{{ raise_exception('only\\nuser messages') }}", "only user messages"),
        ("{% if", "unexpected"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ messages | nosuch }}", "nosuch"),
    ],
)
def test_templates_cannot_leave_their_sandbox(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        ChatTemplate(source, {}).render(HI)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{{ range(99999) | map('string') | map('length') | map('string') | select('in', range(99999)) | list }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a + n.a %}{% endfor %}",
        "{% set n = namespace(a='aa') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = [n.a, n.a] %}{% endfor %}{{ n.a }}",
        "{% set n = namespace(a=1) %}{% set n.n = [n, n] %}{{ n ~ '' }}",
        "{% set n = namespace(a=9) %}{% for i in range(60) %}{% set n.a = n.a * n.a %}{% endfor %}",
        "{% set a = 'aaaaaaaaaa' * 90000 %}{% for i in range(99999) %}{{ a }}{% endfor %}",
        "{% set a %}{% for i in range(99999) %}{{ 'aaaaaaaaaa' * 9000 }}{% endfor %}{% endset %}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '%*d' | format(1000000000, 1) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 1000000000) }}",
        "{{ ('{0}' * 99999).format('a' * 99999) }}",
        "{{ 'x' | center(1000000000) }}",
        "{{ 'x'.center(1000000000) }}",
        "{{ 'x'['zfill'](1000000000) }}",
        "{{ 'x' | attr('ljust') }}{{ ['x'] | map('center', 1000000000) | list }}",
        "{{ (5).to_bytes(1000000000, 'big') }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999) | replace('', 'b' * 99999) }}",
        "{{ ('a' * 99999).join('b' * 99999) }}",
        "{{ ('b' * 99999) | join('a' * 99999) }}",
        "{{ messages | tojson(indent=100000000) }}",
        "{{ 'a\nb' | indent(100000000) }}",
        "{{ 'a' | wordwrap(1) }}",
        "{{ 3.5 | round(1000000000) }}",
        "{{ lipsum(n=100000) }}",
        "{{ strftime_now('%1000000000d') }}",
        "{{ 1 }}" * 200_000,
    ],
    ids=lambda source: source[:50],
)
def test_templates_cannot_work_on_without_end(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.3)
    started = time.process_time()  # what others do on the machine does not count
    with pytest.raises(TokenizerError, match="chat template: ") as caught:
        ChatTemplate(source, {}).render(HI)
    assert time.process_time() - started < 3 and "\n" not in str(caught.value)


def test_what_published_templates_do_goes_on_working() -> None:
    source = (
        "{% set ns = namespace(text='', n=0) %}{% macro show(m) %}<{{ m.role | upper }}>{% endmacro %}"
        "{% for m in messages | selectattr('role', 'in', ['user', 'assistant']) | list %}"
        "{% set ns.n = ns.n + 1 %}{% set ns.text = ns.text ~ show(m) + m['content'] | trim %}"
        "{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem is defined }};{% endfor %}"
        "{{ ns.text }}{{ ns.n }}|{{ messages | map(attribute='role') | join(', ') }}|{{ messages[-1:][0].content }}|"
        "{{ {'b': 1, 'a': [1]} | tojson(indent=4) }}|{{ {'b': 1, 'a': 2} | dictsort | first | last }}|"
        "{% for k, v in {'x': 1}.items() %}{{ k }}={{ v }}{% endfor %}|{{ 'a-b'.split('-') | last | capitalize }}|"
        "{{ ('a' if messages | length > 1 else 'b') | replace('a', 'c') }}|{{ tools | default('none', true) }}|"
        "{{ '%s-%02d' | format('x', 3) }}|{{ '{:>3}'.format('x') }}|{{ 'x,y' | replace(',', ';') }}"
        "{% for m in messages if m.role == 'nobody' %}{% else %}|empty{% endfor %}|"
        "{% for group in messages | groupby('role') %}{{ group.grouper }}{{ group.list | length }}{% endfor %}"
    )
    messages = [{"role": "user", "content": " One "}, {"role": "assistant", "content": "Two"}]
    assert ChatTemplate(source, {}).render(messages) == (
        "1TrueFalse2False;2FalseTrue2True;<USER>One<ASSISTANT>Two2|user, assistant|Two|"
        '{\n    "b": 1,\n    "a": [\n        1\n    ]\n}|2|x=1|B|c|none|x-03|  x|x;y|empty|assistant1user1'
    )


def test_a_long_conversation_may_be_rendered() -> None:
    messages = [{"role": "user", "content": "word " * 1_000_000}, {"role": "assistant", "content": "x"}]
    assert len(TOKENIZER.apply_chat_template(messages)) > 4_999_000


@given(st.text(alphabet="{}%# abcm'\"|[]().*+-_~0123456789\n", max_size=60))
def test_any_text_as_a_template_renders_or_raises_our_error(source: str) -> None:
    try:
        assert isinstance(ChatTemplate(source, {}).render(HI), str)
    except TokenizerError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("messages", [[], [{}], [{"role": "user"}], [{"role": "user", "content": None}], ["Hi."], [3]])
def test_messages_without_role_or_content_are_refused(messages: Any) -> None:
    for render in (TOKENIZER.apply_chat_template, TOKENIZER.encode_chat):
        with pytest.raises(RequestError, match="messages|role and a content"):
            render(messages)


@pytest.mark.parametrize("template", [5, [], [1], {}, [{"name": "default"}], {"other": "x"}, "{{"])
def test_unusable_stored_templates_are_refused(folder: Path, template: Any) -> None:
    with pytest.raises(TokenizerError, match=r"chat.template"):
        Tokenizer.open(set_config(folder, chat_template=template))
