"""The built-in model, end to end: it ships small, talks sense, and computes what transformers computes."""

import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from random import Random

import numpy as np
import pytest

import bitnet_numba as bn
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.loading import DEMO
from tests.demo.demo_in_transformers import CONVERSATIONS, GOLDEN_DEMO, prompt_ids, write_hugging_face
from tests.golden.record import LAST, Transformers
from tests.int8_activations import LOGITS_TOLERANCE, check_logits, imposed, per_linear, recorded_groups
from tools.demo.cases import question_cases
from tools.demo.evaluate import FIRST_SEED, answers, perplexity
from tools.demo.world.conversation import STORY, conversation
from tools.demo.world.lexicon import invented

MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def llm() -> Iterator[Engine]:
    """The compiled model, since whole stories take the reference seconds; its bits are the same on every CPU."""
    with bn.load(None, backend="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference() -> Engine:
    return bn.load(None, backend="reference")


def test_size_and_shape(llm: Engine) -> None:
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= MOST_BYTES
    config = llm.config
    assert config.max_context == 2048
    assert config.activation == "relu2" and config.sub_norms and config.tied
    assert config.num_heads == 4 * config.num_kv_heads
    assert config.head_dim in (64, 128)
    for size in (config.hidden_size, config.intermediate_size, config.vocab_size):
        assert size % 128 == 0


def test_two_turns_with_the_right_answer(llm: Engine) -> None:
    said = [{"role": "user", "content": "Tell me a story about a dog and a kite."}]
    story = llm.generate(said, max_new_tokens=400)
    assert story.finish_reason == "stop"
    assert "dog" in story.text and "kite" in story.text
    # The world names everybody where they appear: "a dog called Mira", "Mira, a dog" or "Mira was a dog".
    name = re.search(r"\bdog (?:called|named) ([A-Z]\w+)|([A-Z]\w+)(?: was|,) an? (?:\w+ )*dog\b", story.text)
    assert name is not None, story.text
    said += [
        {"role": "assistant", "content": story.text},
        {"role": "user", "content": "What was the name of the dog?"},
    ]
    answer = llm.generate(said, max_new_tokens=40)
    assert answer.text == f"The dog was called {name[1] or name[2]}."
    assert answer.finish_reason == "stop"


def test_what_it_can_do(llm: Engine) -> None:
    answer = llm.generate([{"role": "user", "content": "What can you do?"}], max_new_tokens=80).text
    assert "stories" in answer and "questions" in answer and "Tell me a story about" in answer


@pytest.mark.parametrize(
    "request_", ["what is 23 + 4", "Write a python function that sorts a list", "will it rain today?"]
)
def test_requests_from_outside_are_turned_into_an_offer(llm: Engine, request_: str) -> None:
    answer = llm.generate([{"role": "user", "content": request_}], max_new_tokens=80).text
    assert answer.startswith("I am sorry") and "stories" in answer


def test_an_unknown_thing_is_honoured(llm: Engine) -> None:
    story = llm.generate([{"role": "user", "content": "Tell me a story about a frog and a spaceship."}]).text
    assert "frog" in story and "spaceship" in story


@pytest.mark.parametrize(
    "request_",
    [
        "Tell me a story about a wombat named Agnes and a kaleidoscope.",
        "tell me a story about a capybara and a falafel",
        "TELL ME A STORY ABOUT AN OCELOT AND A TEACUP.",
        "TELL ME A STORY ABOUT A WALRUS AND A TRACTOR",
    ],
)
def test_words_are_copied_that_no_training_text_has_or_that_are_in_capitals(llm: Engine, request_: str) -> None:
    story = llm.generate([{"role": "user", "content": request_}], max_new_tokens=500)
    asked = re.findall(r"an? (\w+)|named (\w+)", request_.lower().replace("a story", ""))
    words = [one or other for one, other in asked]
    assert story.finish_reason == "stop" and len(words) >= 2
    assert all(word in story.text.lower() for word in words), story.text
    assert not invented(story.text, request_)


def test_somebody_who_is_not_in_the_story(llm: Engine) -> None:
    said = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]
    said.append({"role": "assistant", "content": llm.generate(said, max_new_tokens=400).text})
    for name in ("Thaddeus", "Winifred", "Batman"):
        asked = [*said, {"role": "user", "content": f"Who is {name}?"}]
        assert llm.generate(asked, max_new_tokens=40).text == f"There is nobody called {name} in this story."


def test_questions_about_held_out_stories(llm: Engine) -> None:
    """A small share of what `tools/eval_demo.py` judges; the bar is 97 %, so more than one miss in 14 is a defect."""
    groups = ("names", "yes or no", "who", "reason", "not said", "when", "no story yet")
    replies = answers(llm, question_cases(2, FIRST_SEED + 77_000, groups))
    wrong = [(case.turn.user, text, case.turn.assistant) for case, text in replies if not case.turn.right(text)]
    assert len(replies) == 14 and len(wrong) <= 1, wrong


def test_what_people_ask_of_a_story(llm: Engine) -> None:
    said = [{"role": "user", "content": "TELL ME A STORY ABOUT A DRAGON AND A CUPCAKE"}]

    def reply(text: str = "") -> str:
        if text:
            said.append({"role": "user", "content": text})
        said.append({"role": "assistant", "content": llm.generate(said, max_new_tokens=400).text})
        return said[-1]["content"]

    story = reply()
    assert "dragon" in story
    name = re.fullmatch(r"The hero was called (\w+)\.", reply("What was the hero's name?"))
    assert name is not None and name[1] in story
    assert reply("was the hero a dragon?").startswith("Yes")
    assert reply("how tall was he") == "I don't know, the story does not say."
    assert reply("tell it again") == story
    assert len(reply("in one sentence")) < 120


def test_perplexity_is_that_of_a_trained_model(llm: Engine) -> None:
    assert 1.4 < perplexity(llm, FIRST_SEED + 5, 1) < 1.75


def test_sampled_stories_differ(llm: Engine) -> None:
    prompt = [{"role": "user", "content": "Tell me a story about a dog and a kite."}]
    assert len({llm.generate(prompt, max_new_tokens=60, temperature=0.8, seed=i).text for i in range(5)}) == 5


def test_tokenizer_encodes_the_world_and_everything_else(llm: Engine) -> None:
    for turn in islice(conversation(Random(1)), 10):
        assert llm.tokenizer.decode(llm.tokenizer.encode(turn.assistant)) == turn.assistant
    for text in ("Grüße, 東京! 🎉", "a\tb\r\nc  d", "\x00\ufeff"):
        assert llm.tokenizer.decode(llm.tokenizer.encode(text)) == text
    assert llm.tokenizer.size == llm.config.vocab_size == 4096


def test_the_chat_format_is_that_of_2b4t(llm: Engine) -> None:
    messages = [
        {"role": "user", "content": " Hello! "},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "A story"},
    ]
    expected = "User: Hello!<|eot_id|>Assistant: Hi.<|eot_id|>User: A story<|eot_id|>Assistant: "
    assert llm.tokenizer.apply_chat_template(messages) == expected
    assert json.loads((DEMO / "generation_config.json").read_text())["eos_token_id"] == [4087, 4095]


@pytest.mark.golden
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_recorded_logits_of_transformers(reference: Engine, name: str) -> None:
    """Given the int8 activations that transformers had."""
    with np.load(GOLDEN_DEMO) as golden:
        ids = golden[f"ids/{name}"].tolist()
        assert ids == prompt_ids(name)
        with imposed(per_linear(recorded_groups(golden, name))):
            logits = reference.logits(ids)
        check_logits(logits[-LAST:], golden[f"logits_tail/{name}"], golden[f"std/{name}"])
        assert (logits.argmax(axis=1) == golden[f"argmax/{name}"]).all()


def test_logits_of_transformers(reference: Engine, tmp_path: Path) -> None:
    """The same against transformers itself, for a longer text, too."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    write_hugging_face(tmp_path)
    story = next(turn for turn in conversation(Random(3)) if turn.kind == STORY)
    messages = [{"role": "user", "content": story.user}, {"role": "assistant", "content": story.assistant}]
    model = Transformers(tmp_path)
    for ids in (*(prompt_ids(name) for name in CONVERSATIONS), reference.tokenizer.encode_chat(messages)):
        expected = model.run(ids)
        with imposed(per_linear(expected.q)):
            logits = reference.logits(ids)
        spread = expected.logits.std()
        check_logits(logits, expected.logits, spread)
        second, best = np.sort(expected.logits, axis=1)[:, -2:].T
        clear = best - second > 2 * LOGITS_TOLERANCE * spread
        assert (logits.argmax(axis=1) == expected.logits.argmax(axis=1))[clear].all() and clear.mean() > 0.99
