"""Conversations as token ids: the template's text, no control token out of a message, and answers kept as ids."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers

from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import FOLDER, TOKENIZER, sentencepiece_like, set_config

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What templates do to a content.
CHANGES = {
    "kept": "m.content",
    "trimmed": "m.content | trim",
    "stripped": "m['content'].strip()",
    "thinking": "m.content.split('</think>')[-1].lstrip('\n')",
    "shortened": "m.content[:12]",
    "shortened2": "m.content[2:-2] | truncate(15)",
    "upper": "m.content | upper",
    "title": "m.content | title",
    "reversed": "m.content[::-1]",
    "without": "m.content | replace('X', '')",
    "without tokens": "m.content | replace('<|im_end|>', '') | replace('</s>', '')",
    "json": "m.content | tojson",
    "ascii": "m | tojson(true)",
    "escaped": "m.content | escape",
    "split": "m.content.split('|') | join('')",
    "sorted": "m.content | sort | join('')",
    "twice": "(m.content ~ m.content)",
    "counted": "(m.content | length | string) + m.content",
    "tested": "('tool' if m.content.startswith('<tool') else m.content)",
    "looked for": "(m.content if '<' in m.content else 'nothing' + m.content)",
}


def chatml_tokenizer(kind: str, change: str) -> Tokenizer:
    """A tokenizer with ChatML turns, whose markers are added tokens that are not special."""
    if kind == "bytes":
        backend = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    else:
        backend = sentencepiece_like()
        backend.normalizer = None
        if kind == "prepend":
            replace = normalizers.Replace(" ", "\u2581")
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
        elif kind == "nfkc":
            backend.normalizer = normalizers.NFKC()
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    markers = [AddedToken(text, special=False, normalized=kind == "nfkc") for text in ("<|im_start|>", "<|im_end|>")]
    backend.add_tokens([*markers, "<think>", "</think>", AddedToken("  ", normalized=False)])
    return Tokenizer(backend, CHATML.replace("CONTENT", CHANGES[change]))


KINDS = ["bytes", "prepend", "first", "always", "nfkc"]
ALL = {(kind, change): chatml_tokenizer(kind, change) for kind in KINDS for change in CHANGES}
some_tokenizer = st.sampled_from(sorted(ALL))
roles = st.sampled_from(["system", "user", "assistant"])
pieces = [
    "hello",
    " ",
    "  ",
    "\n",
    "X",
    "w\u00e9",
    "a < b",
    "a|b",
    "</think>",
    "<think>",
    "<tool",
    "\U0001f642",
    "\ufdd1",
]
ordinary = st.lists(st.sampled_from(pieces), max_size=6).map("".join)
forged = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<s>", "</s>", "<|begin_of_text|>", "\uff1c|im_end|\uff1e"]
parts = [*forged, "<|im_", "end|>", "<|iXm_end|>", "<<|im_end|>|im_end|>", "</<s>s>", ">|dne_mi|<", "<", "|>", "\udc00"]
hostile = st.lists(st.sampled_from([*pieces, *parts]), max_size=6).map("".join)


def conversation(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    message = st.builds(lambda role, text: {"role": role, "content": text}, roles, content)
    return st.lists(message, min_size=1, max_size=3)


def control_ids(tokenizer: Tokenizer) -> set[int]:
    return set(tokenizer._guarded._ids)


@given(some_tokenizer, conversation(ordinary), st.booleans())
def test_ordinary_conversations_are_the_encoded_text(
    which: tuple[str, str], messages: list[dict[str, Any]], prompt: bool
) -> None:
    tokenizer = ALL[which]
    text = tokenizer._template.render(messages, prompt)
    assert tokenizer.apply_chat_template(messages, prompt) == text
    assert tokenizer.encode_chat(messages, prompt) == tokenizer.encode(text)


@given(some_tokenizer, conversation(hostile))
def test_no_control_token_comes_out_of_a_message(which: tuple[str, str], messages: list[dict[str, Any]]) -> None:
    tokenizer = ALL[which]
    ids = tokenizer.encode_chat(messages)
    harmless = [{**message, "content": "hello"} for message in messages]
    controls = control_ids(tokenizer)
    assert [i for i in ids if i in controls] == [i for i in tokenizer.encode_chat(harmless) if i in controls]


@given(st.sampled_from(KINDS), conversation(hostile))
def test_hostile_contents_stay_in_the_text(kind: str, messages: list[dict[str, Any]]) -> None:
    tokenizer = ALL[kind, "kept"]
    text = tokenizer.apply_chat_template(messages)
    assert text == tokenizer._template.render(messages).replace("\udc00", "\ufffd")
    ids = tokenizer.encode_chat(messages)
    if kind == "bytes":
        assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>" + text
    elif kind != "nfkc":
        # Whole words are found again, apart from the spaces that the library itself puts behind added tokens.
        assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == text.replace(" ", "")


def test_text_parts_cannot_join_to_a_control_token() -> None:
    tokenizer = ALL["bytes", "kept"]
    source = "{% for m in messages %}<|im_start|>{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    joins = Tokenizer(tokenizer._backend, source)
    contents = [
        [{"type": "text", "text": text} for text in cut] for cut in (("<|im_", "start|>"), ("<", "|im_start|>"))
    ]
    ids = joins.encode_chat([{"role": "user", "content": content} for content in contents])
    assert ids.count(tokenizer._backend.token_to_id("<|im_start|>")) == 2


def test_roles_may_be_a_part_of_a_control_token(folder: Path) -> None:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["added_tokens"][5]["content"] = "<|user|>"
    raw["added_tokens"][6]["content"] = "<|assistant|>"
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
    tokenizer = Tokenizer.open(set_config(folder, chat_template=source))
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|assistant|>"}])
    assert ids[1] == tokenizer._backend.token_to_id("<|user|>")
    assert tokenizer._backend.token_to_id("<|assistant|>") not in ids


# Answers given as ids


def spelled(text: str) -> list[int]:
    """Ids of a text that no encoder writes: a token for each character."""
    return [i for character in text for i in TOKENIZER.encode(character, add_bos=False)]
