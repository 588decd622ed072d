"""Evaluates a model of the text world on stories it has never seen.

For each of N conversations about held-out pairs of hero and thing: the model tells the story that is asked for, and
answers two questions about a story of the world, whose right answers are known, in later turns of one conversation.
Then: the perplexity of held-out replies, and how many of the stories sampled for one and the same request differ.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from random import Random
from time import perf_counter

import numpy as np
from rich.progress import track

from bitnet_numba.engine.engine import Engine
from bitnet_numba.text.chat_template import Message
from tools.demo.world.conversation import QUESTION, STORY, Turn, conversation

FIRST_SEED = 1 << 41  # seeds from here on were never used in training
SAMPLED_REQUEST = "Tell me a story about a dog and a kite."
TEMPERATURE = 0.8
MAX_STORY, MAX_ANSWER = 400, 60  # tokens
THRESHOLDS = {"exact": 0.97, "honoured": 0.95, "distinct": 1.0}


def message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def turns_of(seed: int) -> Iterator[Turn]:
    """A story about a held-out pair and two questions about it, with whatever is said between."""
    questions = 0
    for turn in conversation(Random(seed), evaluation=True):
        yield turn
        questions += turn.kind == QUESTION
        if questions == 2:
            return


def converse(llm: Engine, seed: int) -> tuple[bool, list[tuple[Turn, str]]]:
    """Whether the model's own story holds what was asked for, and its answer to each question."""
    said: list[Message] = []
    honoured = False
    answers = []
    with llm.session() as session:
        for turn in turns_of(seed):
            said.append(message("user", turn.user))
            if turn.kind == STORY:
                story = session.generate(said, max_new_tokens=MAX_STORY)
                honoured = story.finish_reason == "stop" and all(word in story.text for word in turn.mentions)
            elif turn.kind == QUESTION:
                answers.append((turn, session.generate(said, max_new_tokens=MAX_ANSWER).text))
            # The conversation goes on with the world's own reply: it decides which answers are right.
            said.append(message("assistant", turn.assistant))
    return honoured, answers


def perplexity(llm: Engine, seed: int, conversations: int) -> float:
    """exp of the mean loss of the tokens of held-out replies, each conversation filling the context."""
    total, count = 0.0, 0
    for i in track(range(conversations), "perplexity", transient=True):
        ids: list[int] = llm.tokenizer.encode("")
        said = [False]
        for turn in conversation(Random(seed + i), evaluation=True):
            asked = llm.tokenizer.encode(f"User: {turn.user}<|eot_id|>Assistant: ", add_bos=False)
            answered = llm.tokenizer.encode(f"{turn.assistant}<|eot_id|>", add_bos=False)
            if len(ids) + len(asked) + len(answered) > llm.config.max_context:
                break
            ids += asked + answered
            said += [False] * len(asked) + [True] * len(answered)
        logits = llm.logits(ids)[:-1].astype(np.float64)
        targets, counted = np.array(ids[1:]), np.array(said[1:])
        highest = logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(logits - highest).sum(axis=1)) + highest[:, 0] - logits[np.arange(len(targets)), targets]
        total += float(losses[counted].sum())
        count += int(counted.sum())
    return float(np.exp(total / count))


def distinct_share(llm: Engine, seed: int, samples: int) -> float:
    """Share of different stories among so many sampled for one request."""
    prompt = [message("user", SAMPLED_REQUEST)]
    stories = set()
    with llm.session() as session:
        for i in track(range(samples), "sampled stories", transient=True):
            answer = session.generate(prompt, temperature=TEMPERATURE, seed=seed + i, max_new_tokens=MAX_STORY)
            stories.add(answer.text)
    return len(stories) / samples


def judge(llm: Engine, other: Engine | None, args: argparse.Namespace) -> dict[str, float]:
    """All figures, and the wrong answers on standard error."""
    started = perf_counter()
    honoured, right = 0, Counter[bool]()
    for i in track(range(args.number), "stories and questions", transient=True):
        told, answers = converse(llm, FIRST_SEED + args.seed * 1_000_000 + i)
        honoured += told
        for turn, answer in answers:
            right[answer == turn.assistant] += 1
            if answer != turn.assistant:
                print(f"  {turn.user!r}: {answer[:100]!r}, not {turn.assistant!r}", file=sys.stderr)
    figures = {
        "stories": args.number,
        "questions": right.total(),
        "exact": right[True] / right.total(),
        "honoured": honoured / args.number,
        "distinct": distinct_share(llm, args.seed * 1_000_000, args.samples),
        "samples": args.samples,
        "perplexity": perplexity(llm, FIRST_SEED - 1_000_000, args.conversations),
    }
    if other is not None:
        figures["perplexity_against"] = perplexity(other, FIRST_SEED - 1_000_000, args.conversations)
    figures["seconds"] = round(perf_counter() - started, 1)
    return figures


def report(llm: Engine, figures: dict[str, float]) -> str:
    lines = [
        f"backend                                   {llm.backend}",
        f"questions answered exactly right          {figures['exact']:.1%} of {figures['questions']:.0f}",
        f"stories that mention what was asked for   {figures['honoured']:.1%} of {figures['stories']:.0f}",
        f"different stories at temperature {TEMPERATURE}      {figures['distinct']:.0%} of {figures['samples']:.0f}",
        f"perplexity of held-out replies            {figures['perplexity']:.5f}",
    ]
    if "perplexity_against" in figures:
        change = figures["perplexity"] / figures["perplexity_against"] - 1
        lines.append(f"    of the other checkpoint               {figures['perplexity_against']:.5f} ({change:+.4%})")
    lines.append(f"seconds                                   {figures['seconds']}")
    return "\n".join(lines)
