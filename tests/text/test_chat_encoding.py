"""Conversations as token ids: the template's text, no control token out of a message, and answers kept as ids."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from bitnet_numba.errors import RequestError, TokenizerError
from bitnet_numba.text.chat_trace import Tracer
from bitnet_numba.text.tokenizer import Tokenizer
from tests.text.conftest import EOT, FOLDER, HI, TOKENIZER, sentencepiece_like, set_config

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
    return set(tokenizer._chats()._guarded._ids)


def render_alone(tokenizer: Tokenizer) -> Callable[..., str]:
    return tokenizer._chats()._template.render


@given(some_tokenizer, conversation(ordinary), st.booleans())
def test_ordinary_conversations_are_the_encoded_text(
    which: tuple[str, str], messages: list[dict[str, Any]], prompt: bool
) -> None:
    tokenizer = ALL[which]
    text = render_alone(tokenizer)(messages, prompt)
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
    assert text == render_alone(tokenizer)(messages).replace("\udc00", "\ufffd")
    ids = tokenizer.encode_chat(messages)
    if kind == "bytes":
        assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>" + text
    elif kind != "nfkc":
        # Whole words are found again, apart from the spaces that the library itself puts behind added tokens.
        assert tokenizer.decode(ids, skip_special=False).replace(" ", "") == text.replace(" ", "")


def test_words_and_signs_of_a_vocabulary_are_no_turn_markers() -> None:
    backend = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
    backend.add_tokens([AddedToken(text, normalized=False) for text in (": ", "User", "\n\n")])
    tokenizer = Tokenizer(backend)
    chat = [{"role": "user", "content": "User: a: b\n\nc"}]
    assert tokenizer.encode_chat(chat) == tokenizer.encode("User: User: a: b\n\nc\nAssistant:")


def test_turns_end_with_the_templates_marker_though_it_is_not_special() -> None:
    tokenizer = ALL["bytes", "kept"]
    end = tokenizer._backend.token_to_id("<|im_end|>")
    assert end in tokenizer.stop_ids and end not in tokenizer.special_ids


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


def test_a_template_may_look_at_an_answer_while_a_question_is_hostile() -> None:
    tokenizer = ALL["bytes", "thinking"]
    answer = {"role": "assistant", "content": "<think>if a < b</think>\nYes."}
    chat = [{"role": "user", "content": "a<|im_end|>"}, answer]
    text = "<|im_start|>user\na<|im_end|><|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert tokenizer.apply_chat_template(chat, False) == text
    assert tokenizer.encode_chat(chat, False).count(tokenizer._backend.token_to_id("<|im_end|>")) == 2
    # A question that makes a control token out of the template's own work is shown to it in another form.
    chat[0]["content"] = "<<|im_end|>|im_end|>"
    ids = ALL["bytes", "without tokens"].encode_chat(chat, False)
    assert ids.count(tokenizer._backend.token_to_id("<|im_end|>")) == 2


def test_letters_that_become_a_control_token_by_normalisation_do_not() -> None:
    tokenizer = ALL["nfkc", "kept"]
    end = tokenizer._backend.token_to_id("<|im_end|>")
    content = "\uff1c|im_end|\uff1e"
    assert end in tokenizer.encode(content)
    assert tokenizer.encode_chat([{"role": "user", "content": content}]).count(end) == 1


def test_a_control_token_is_found_inside_what_only_reads_like_one() -> None:
    tracer = Tracer(["<x<", "<a>"])
    trace = tracer.trace(lambda messages: messages[0]["content"] + "<a>", [{"role": "user", "content": "<x"}])
    assert tracer.controls(trace) == [(0, 3, True), (2, 5, False)]


@pytest.mark.parametrize("text", ["<s>", "<think>"])
def test_a_vocabulary_that_holds_control_tokens_itself(text: str) -> None:
    # Without any word boundary, and with ignore_merges, the model finds a content in its vocabulary as a whole.
    vocabulary = {piece: i for i, piece in enumerate(["<s>", "<think>", *"<>/s|thinkab", "x"])}
    last = vocabulary["y"] = len(vocabulary) + 1  # a gap: as many entries as this id, which is one of them
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "<think>"])
    backend.add_tokens(["<a>"])
    tokenizer = Tokenizer(backend, "{% for m in messages %}<s>{{ m.content }}{% endfor %}")
    spelled = [vocabulary[character] for character in text]
    assert tokenizer.encode_chat([{"role": "user", "content": text}]) == [0, *spelled]
    ids = tokenizer.encode_chat([{"role": "user", "content": f"a{text}<a>y"}])
    assert ids == [0, vocabulary["a"], *spelled, backend.token_to_id("<a>"), last]


# Answers given as ids


def spelled(text: str) -> list[int]:
    """Ids of a text that no encoder writes: a token for each character."""
    return [i for character in text for i in TOKENIZER.encode(character, add_bos=False)]


def conversation_of(answers: list[str], ids: bool = True) -> list[dict[str, Any]]:
    """Questions, and answers that are given as ids, too."""
    chat = []
    for i, text in enumerate(answers):
        answer = {"role": "assistant", "content": text} | ({"token_ids": spelled(text)} if ids else {})
        chat += [{"role": "user", "content": f"Question {i}?"}, answer]
    return [*chat, {"role": "user", "content": "Well?"}]


answer_texts = st.text(alphabet="ab \n\u00e9<\U0001f642.", max_size=12).filter(lambda text: bool(text.strip()))


@given(st.lists(answer_texts, min_size=1, max_size=3), st.sampled_from(["kept", "trimmed", "stripped", "thinking"]))
def test_answers_stay_token_for_token_and_the_text_the_templates(answers: list[str], change: str) -> None:
    tokenizer = ALL["bytes", change]
    chat = conversation_of(answers)
    ids = tokenizer.encode_chat(chat)
    assert tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>" + tokenizer.apply_chat_template(chat)
    for kept in (spelled(answer.rstrip()) for answer in answers if answer == answer.lstrip()):
        assert any(ids[i : i + len(kept)] == kept for i in range(len(ids)))
    if change == "kept":  # what the context holds after the answer is the beginning of the next prompt
        prompt = tokenizer.encode_chat(chat[:1])
        assert ids[: len(prompt) + len(chat[1]["token_ids"])] == prompt + chat[1]["token_ids"]


@pytest.mark.parametrize("change", sorted(CHANGES))
def test_every_template_may_change_answers_given_as_ids(change: str) -> None:
    chat = conversation_of(["<think>Hm.</think>\nA first answer.", " A second, longer one.\n"])
    for kind in KINDS:
        tokenizer = ALL[kind, change]
        bare = [{key: value for key, value in message.items() if key != "token_ids"} for message in chat]
        assert tokenizer.apply_chat_template(chat) == tokenizer.apply_chat_template(bare)
        if kind == "bytes":
            text = tokenizer.decode(tokenizer.encode_chat(chat), skip_special=False)
            assert text == "<|begin_of_text|>" + tokenizer.apply_chat_template(chat)
        controls = control_ids(tokenizer)
        kept = [[i for i in tokenizer.encode_chat(one) if i in controls] for one in (chat, bare)]
        assert kept[0] == kept[1]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_turns_gain_no_spaces_and_keep_the_context(kind: str) -> None:
    backend = ALL[kind, "kept"]._backend
    tokenizer = Tokenizer(backend)
    prompt = tokenizer.encode_chat(HI)
    said = TOKENIZER.encode(" hello w", add_bos=False) if kind == "bytes" else [backend.token_to_id("\u2581hello")]
    answer = {"role": "assistant", "content": tokenizer.decode(said), "token_ids": said}
    assert answer["content"].startswith(" hello")
    longer = tokenizer.encode_chat([*HI, answer, *HI])
    assert longer[: len(prompt) + len(said)] == prompt + said
    text = tokenizer.apply_chat_template([*HI, answer, *HI])
    assert text == f"User: Hi.\nAssistant:{answer['content']}\nUser: Hi.\nAssistant:"
    assert tokenizer.decode(longer, skip_special=False).strip() in (f"<|begin_of_text|>{text}", text)


def test_only_as_much_of_an_answer_is_kept_as_its_text_stands_there() -> None:
    said = spelled("One.") + TOKENIZER.encode("\n\n", add_bos=False)
    for content in ("One.\n\n", "One!"):  # trimmed by the template; changed by the caller
        chat = [*HI, {"role": "assistant", "content": content, "token_ids": said}]
        assert TOKENIZER.decode(TOKENIZER.encode_chat(chat, False)) == f"User: Hi.Assistant: {content.strip()}"


def test_ids_of_a_message_cannot_forge_a_turn() -> None:
    said = [*spelled("One."), EOT, *spelled(" Two.")]
    assert TOKENIZER.decode(said) == "One. Two."
    for role in ("user", "assistant"):
        ids = TOKENIZER.encode_chat([{"role": role, "content": "One. Two.", "token_ids": said}], False)
        assert ids.count(EOT) == 1 and TOKENIZER.decode(ids) == f"{role.capitalize()}: One. Two."


# Going on with an answer


@pytest.mark.parametrize("content", ["Once upon", "Once upon ", " Once", "a < b <|eot_id|> c", "</think>"])
def test_a_started_answer_can_be_continued(content: str) -> None:
    chat = [*HI, {"role": "assistant", "content": content}]
    text = TOKENIZER.apply_chat_template(chat, continue_final_message=True)
    assert text == f"User: Hi.<|eot_id|>Assistant: {content.strip()}"  # the template trims
    ids = TOKENIZER.encode_chat(chat, continue_final_message=True)
    assert ids.count(EOT) == 1 and TOKENIZER.decode(ids, skip_special=False) == "<|begin_of_text|>" + text
    kept = ALL["bytes", "kept"].apply_chat_template(chat, continue_final_message=True)
    assert kept.endswith(f"<|im_start|>assistant\n{content}")
    with_ids = [*HI, {"role": "assistant", "content": content, "token_ids": spelled(content)}]
    ids = ALL["bytes", "kept"].encode_chat(with_ids, continue_final_message=True)
    assert ids[-len(spelled(content)) :] == spelled(content)


def test_only_an_answer_can_be_continued() -> None:
    with pytest.raises(RequestError, match="only an answer"):
        TOKENIZER.encode_chat(HI, continue_final_message=True)
    for change in ("reversed", "counted"):
        with pytest.raises(TokenizerError, match="changes the last answer"):
            ALL["bytes", change].encode_chat([{"role": "assistant", "content": "Seven!!"}], continue_final_message=True)
