"""Chat templates: where they are found, what they see, and the sandbox that bounds them."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.engine.loading import DEMO
from bitnet_numba.errors import RequestError, TokenizerError
from bitnet_numba.text import chat_template
from bitnet_numba.text.chat_template import BITNET_TEMPLATE, PUBLISHED_BITNET_TEMPLATE, ChatTemplate
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import EOS, FOLDER, HI, TOKENIZER, set_config


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


def test_a_template_file_too_large_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_FILE", 9)
    (folder / "chat_template.jinja").write_text("0123456789")
    with pytest.raises(TokenizerError, match="larger than any chat template"):
        Tokenizer.open(folder).encode_chat(HI)


def test_our_own_templates_are_rendered_without_another_process() -> None:
    for folder in (FOLDER, DEMO):
        tokenizer = Tokenizer.open(folder)
        assert tokenizer._chats()._template.source in chat_template.TRUSTED
    assert BITNET_TEMPLATE in chat_template.TRUSTED
    ours, theirs = (ChatTemplate(source, {}).render(HI) for source in (BITNET_TEMPLATE, PUBLISHED_BITNET_TEMPLATE))
    assert ours == theirs


def test_a_text_without_end_is_not_passed_on() -> None:
    with pytest.raises(TokenizerError, match="it makes a text of 20,000,000 characters"):
        ChatTemplate("{{ 'ab' * 10000000 }}", {}).render(HI)


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
        ("{{ lipsum.__globals__ }}{{ joiner.__init__.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update(role='x') }}", "unsafe"),
        ("{% do messages[0].update(role='x') %}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(messages) }}", "unsafe"),
        ("{{ ['{0.__class__.__mro__}'] | map('format', messages) | list }}", "^chat template: (?!.*class 'object')"),
        ("{{ (messages | attr('__class__')).mro() }}", "unsafe"),
        ("{{ [''] | map(attribute='__class__.__mro__') | list | first | first }}", "unsafe|undefined"),
        ("{% for i in range(1000000000) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('only\\n\x1b[31muser messages') }}", r"only \\x1b\[31muser messages"),
        ("{% if", "unexpected"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include '/etc/passwd' %}", "loader"),
        ("{{ messages | nosuch }}", "nosuch"),
    ],
)
def test_templates_cannot_leave_their_sandbox(source: str, message: str) -> None:
    with pytest.raises(TokenizerError, match=message) as caught:
        shown = ChatTemplate(source, {}).render(HI)
        raise TokenizerError(f"chat template: {shown}")  # what may be shown is what the pattern says
    assert str(caught.value).isprintable()


ESCAPES = r"""
{{ self._TemplateReference__context }}
{{ cycler.__init__ }}
{{ namespace.__init__.__globals__ }}
{{ joiner.__class__ }}
{{ lipsum.__globals__ }}
{{ lipsum.func_globals }}
{{ range.__self__ }}
{{ dict.__base__ }}
{{ dict.mro() }}
{{ [].__class__ }}
{{ ()|attr('__class__') }}
{{ ()|attr('\x5f\x5fclass\x5f\x5f') }}
{{ ''['__class__'] }}
{{ ''|map(attribute='__class__')|list }}
{{ ['']|map(attribute='__class__')|list }}
{{ ['']|groupby('__class__') }}
{{ ['']|sort(attribute='__class__.__name__') }}
{{ ['']|sum(attribute='__class__', start=0) }}
{{ ['']|selectattr('__class__')|list|length }}
{{ '{0.__class__}'.format('') }}
{{ '{a.__class__}'.format_map({'a':1}) }}
{{ ('{0.__class__}'|string).format(1) }}
{{ '%s'.__class__ }}
{{ ['{0.__class__}']|map('format', 1)|list }}
{% set f='{0.__class__.__base__.__subclasses__}'.format %}{{ f(1) }}
{{ 'abc'.format.__self__ }}
{{ messages.__reduce__() }}
{{ messages.__getitem__.__self__ }}
{{ raise_exception.__code__ }}
{{ strftime_now.__globals__['os'] }}
{{ strftime_now.__builtins__ }}
{% for i in [1] %}{{ loop.__class__ }}{{ loop._iterator }}{% endfor %}
{% for i in [1] %}{{ loop._undefined }}{% endfor %}
{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{{ m._func.__globals__ }}
{% macro m() %}{% endmacro %}{{ m._environment }}
{{ self.blocks }}
{% block a %}{{ self.a._stack }}{% endblock %}
{% block a %}{{ super.__init__ }}{% endblock %}
{{ undefined_thing.__class__ }}
{{ undefined_thing._undefined_exception }}
{{ messages|tojson(indent=messages) }}
{{ 'a'.encode('idna').__class__ }}
{{ (1).__class__ }}
{{ True.__class__.__base__ }}
{{ messages|attr('append')(1) }}
{{ messages.clear() }}
{{ messages.sort() }}
{{ messages[0].pop('role') }}
{{ messages[0].setdefault('x', 1) }}
{% set messages[0].role = 'x' %}
{% do messages[0].__setitem__('role','x') %}
{% from '/etc/passwd' import x %}
{% extends '/etc/passwd' %}
{{ ''.join.__self__ }}
{{ messages|pprint|attr('__class__') }}
{{ namespace(a=1).__dict__ }}
{{ namespace(a=1)._Namespace__attrs }}
{% set n = namespace() %}{% set n.__class__ = 1 %}
{{ ['x']|map('attr','__class__')|list }}
{{ 'x'|attr('format')('{}') }}
{{ ('{0.__class__}'|attr('format'))(1) }}
{{ ('{0.__class__}'|attr('format_map'))({}) }}
{{ ['{0.__class__}'|attr('format')]|map('first')|list }}
{{ cycler('a').__init__.__globals__ }}
{{ cycler('a').next.__func__ }}
{{ dict(a=1).items.__self__ }}
{{ messages.__class__.__init__ }}
"""


@pytest.mark.parametrize("source", ESCAPES.split("\n")[1:-1])
def test_known_ways_out_of_the_sandbox_lead_nowhere(source: str) -> None:
    messages = copy.deepcopy(HI)
    try:
        shown = ChatTemplate(source, {}).render(messages)
    except TokenizerError as error:
        shown = str(error).partition("unsafe")[0]
    assert not re.search(r"<(class|function|module|built-in|bound)|object at 0x|mappingproxy|root:", shown)
    assert messages == HI


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %};{% endfor %}", "Hi.;"),
        ("{% set l = [messages] %}{% do l | length %}x", "x"),
        ("{{ 2 ** 10 }}{{ 3.14159 | round(2) }}{{ 'abcdefghi' | truncate(2, true, '') }}", "10243.14ab"),
        ("{{ [1, 2, 3] | batch(2) | list }}{{ [1, 2, 3] | slice(2) | list }}", "[[1, 2], [3]][[1, 2], [3]]"),
        ("{{ 'a' | center(3) }}{{ 'a b' | wordwrap(1) }}{{ {'a': 1} | pprint }}", " a a\nb{'a': 1}"),
        ("{{ 'a b' | urlencode }}{{ '<b>x</b>' | striptags }}{{ '7'.zfill(3) }}{{ 'a'.ljust(2) }}", "a%20bx007a "),
        ("{% set c = cycler('a', 'b') %}{{ c.next() }}{% set j = joiner() %}{{ j() }}{{ j() }}", "a, "),
        ("{{ {'\u00e9': '<'} | tojson }}{{ {'\u00e9': '<'} | tojson(4) }}", '{"\u00e9": "<"}{"\\u00e9": "<"}'),
        ("{{ [1] | tojson(indent=1) }}", "[\n 1\n]"),
        ("{{ sep_token }}{{ additional_special_tokens[0] }}{{ nothing }}", "<sep><extra>"),
    ],
)
def test_templates_can_use_what_transformers_gives_them(source: str, text: str) -> None:
    variables = {"sep_token": "<sep>", "additional_special_tokens": ["<extra>"]}
    assert ChatTemplate(source, variables).render(HI) == text


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


@pytest.mark.parametrize(
    "messages",
    [[], [{}], [{"role": "user"}], [{"role": "user", "content": None}], ["Hi."], [3], "Hi.", {"role": "user"}, None, 3],
)
def test_messages_without_role_or_content_are_refused(messages: Any) -> None:
    for render in (TOKENIZER.apply_chat_template, TOKENIZER.encode_chat):
        with pytest.raises(RequestError, match="a list of messages|a role and a content|the content must be"):
            render(messages)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, "must be of type text"),
        ({"role": "user", "content": [3]}, "must be of type text"),
        ({"role": "user", "content": b"x"}, "must be a string or a list"),
        ({"role": "t\x1bool", "content": "x"}, r"no role 't\\x1bool'"),
        ({"role": "wizard", "content": "x"}, "no role 'wizard'"),
        ({"role": "user", "content": "x", "extra": object()}, "JSON cannot"),
        ({"role": "user", "content": "x", "token_ids": "12"}, "must be integers"),
        ({"role": "user", "content": "x", "token_ids": [1.5]}, "must be integers"),
        ({"role": "user", "content": "x", "token_ids": [True]}, "must be integers"),
        ({"role": "user", "content": "x", "token_ids": 3}, "must be integers"),
    ],
)
def test_messages_that_cannot_be_used_are_told(message: Any, told: str) -> None:
    with pytest.raises(RequestError, match=f"message 2.*{told}"):
        TOKENIZER.encode_chat([*HI, message])


def test_contents_may_be_text_parts_or_nothing(folder: Path) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "Two"}]
    chat = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}, *HI]
    expected = "User: One\nTwo<|eot_id|>Assistant: <|eot_id|>User: Hi.<|eot_id|>Assistant: "
    assert TOKENIZER.apply_chat_template(chat) == expected
    # A template that joins the parts of a content itself says how.
    source = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
        "{{ part.text }}{% endfor %}{% endif %};{% endfor %}"
    )
    assert Tokenizer.open(set_config(folder, chat_template=source)).apply_chat_template(chat) == "OneTwo;;Hi.;"


def test_a_template_that_names_a_role_may_get_it(folder: Path) -> None:
    source = "{% for m in messages %}{% if m.role == 'tool' %}[{{ m.content }}]{% endif %}{% endfor %}"
    tokenizer = Tokenizer.open(set_config(folder, chat_template=source))
    assert tokenizer.apply_chat_template([*HI, {"role": "tool", "content": "4"}]) == "[4]"
    set_config(folder, chat_template="{% for m in messages %}{{ m.role ~ '<|eot_id|>' }}{% endfor %}")
    for role in ("<|eot_id|>", ".*", "|", ""):
        with pytest.raises(RequestError, match="knows no role"):
            Tokenizer.open(folder).encode_chat([{"role": role, "content": "4"}])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (5, "not a string"),
        ([1], "templates with names"),
        ([{"name": []}], "templates with names"),
        ([{"name": "default"}], "empty"),
        ([], "no chat template is named default"),
        ({}, "no chat template is named default"),
        ({"other": "x", "to\x1bol": "y"}, r"named default, only other, to\\x1bol"),
        ("{{", "unexpected"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "longer than 0.3 seconds"),
    ],
)
def test_a_template_that_cannot_be_used_stops_only_chats(
    folder: Path, template: Any, reason: str, caplog: pytest.LogCaptureFixture, quick: None
) -> None:
    tokenizer = Tokenizer.open(set_config(folder, chat_template=template))
    assert len(caplog.messages) == 1 and "chats will be refused" in caplog.messages[0]
    assert tokenizer.encode("x") == TOKENIZER.encode("x")
    assert tokenizer.has_chat_template and tokenizer.stop_ids == {EOS}
    with pytest.raises(TokenizerError, match=reason) as caught:
        tokenizer.encode_chat(HI)
    assert str(caught.value).isprintable()


def test_additional_templates_have_names(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("no")
    assert Tokenizer.open(folder).apply_chat_template(HI) == TOKENIZER.apply_chat_template(HI)
    set_config(folder, chat_template=None)
    with pytest.raises(TokenizerError, match="only rag"):
        Tokenizer.open(folder).encode_chat(HI)
    (folder / "additional_chat_templates" / "default.jinja").write_text("D:{{ messages[0]['content'] }}")
    assert Tokenizer.open(folder).apply_chat_template(HI) == "D:Hi."
