"""Evaluates a model of the text world on stories, questions and requests that it has never seen; see `cases.py`.

The model answers questions of every kind about stories of the world, whose right answers are known, and tells the
stories that are asked for. Then: the perplexity of held-out replies, and how many of the stories sampled for one and
the same request differ.
"""

import argparse
import sys
from collections import defaultdict
from dataclasses import replace
from random import Random
from time import perf_counter

import numpy as np
from rich.progress import track

from bitnet_numba.engine.engine import Engine
from bitnet_numba.text.chat_template import Message
from tools.demo.cases import Case, exact_shares, invented_words, lacking, question_cases, request_cases
from tools.demo.world.conversation import conversation

FIRST_SEED = 1 << 41  # seeds from here on were never used in training
SAMPLED_REQUEST = "Tell me a story about a dog and a kite."
TEMPERATURE = 0.8
MAX_STORY = 700  # tokens: a story full of words that are spelt out is long
AT_ONCE = 16  # prompts
THRESHOLDS = {"exact": 0.97, "honoured": 0.95, "distinct": 1.0}


def message(role: str, text: str) -> Message:
    return {"role": role, "content": text}


def messages(case: Case) -> list[Message]:
    """A case as the model is asked: with the world's own earlier replies, which decide what is right."""
    said = [m for turn in case.before for m in (message("user", turn.user), message("assistant", turn.assistant))]
    return [*said, message("user", case.turn.user)]


def answers(llm: Engine, cases: list[Case]) -> list[tuple[Case, str]]:
    """The model's greedy answer in each case."""
    told = []
    for i in track(range(0, len(cases), AT_ONCE), "questions", transient=True):
        part = cases[i : i + AT_ONCE]
        limit = max(len(llm.tokenizer.encode(case.turn.assistant)) for case in part) + 24
        completions = llm.generate_batch([messages(case) for case in part], max_new_tokens=limit)
        told += [(case, completion.text) for case, completion in zip(part, completions, strict=True)]
    return told


def stories(llm: Engine, cases: list[Case], seed: int) -> list[tuple[Case, str]]:
    """A story for each request, sampled as the model's folder recommends; "" where it did not end."""
    assert llm.sampling is not None
    told = []
    for i in track(range(0, len(cases), AT_ONCE), "stories", transient=True):
        part = cases[i : i + AT_ONCE]
        params = [replace(llm.sampling, max_new_tokens=MAX_STORY, seed=seed + i + j) for j in range(len(part))]
        completions = llm.generate_batch([messages(case) for case in part], params)
        told += [(c, a.text if a.finish_reason == "stop" else "") for c, a in zip(part, completions, strict=True)]
    return told


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


def judge(llm: Engine, other: Engine | None, args: argparse.Namespace) -> dict[str, object]:
    """All figures; what went wrong is printed on standard error."""
    started = perf_counter()
    first = FIRST_SEED + args.seed * 100_000_000
    answered = answers(llm, question_cases(args.number, first))
    for case, reply in answered:
        if not case.turn.right(reply):
            print(f"  {case.group}: {case.turn.user!r}: {reply!r}, not {case.turn.assistant!r}", file=sys.stderr)
    told = stories(llm, request_cases(args.stories, first + 50_000_000), args.seed * 1_000_000)
    missed: dict[str, list[bool]] = defaultdict(list)
    inventing = 0
    for case, reply in told:
        absent = lacking(case, reply)
        missed[f"{case.group}, {'known' if case.turn.learned else 'unseen'} words"].append(bool(absent))
        invented = sorted(invented_words(case, reply))
        inventing += bool(invented)
        if absent or invented:
            print(f"  {case.turn.user!r}: lacks {absent}, invents {invented}: {reply!r}", file=sys.stderr)
    figures: dict[str, object] = {
        "number": args.number,
        "exact": exact_shares(answered),
        "stories": len(told),
        "honoured": {group: 1 - sum(misses) / len(misses) for group, misses in sorted(missed.items())},
        "inventing": inventing,
        "distinct": distinct_share(llm, args.seed * 1_000_000, args.samples),
        "samples": args.samples,
        "perplexity": perplexity(llm, FIRST_SEED - 1_000_000, args.conversations),
    }
    if other is not None:
        figures["perplexity_against"] = perplexity(other, FIRST_SEED - 1_000_000, args.conversations)
    figures["seconds"] = round(perf_counter() - started, 1)
    return figures


def below(figures: dict) -> list[str]:
    """What misses its threshold."""
    return [
        *(group for group, share in figures["exact"].items() if share < THRESHOLDS["exact"]),
        *(group for group, share in figures["honoured"].items() if share < THRESHOLDS["honoured"]),
        *(["different stories"] if figures["distinct"] < THRESHOLDS["distinct"] else []),
        *(["invented words"] if figures["inventing"] else []),
    ]


def report(llm: Engine, figures: dict) -> str:
    lines = [f"backend                                   {llm.backend}"]
    lines.append(f"answered exactly right, of {figures['number']} each")
    lines += [f"    {group:38s}{share:.1%}" for group, share in figures["exact"].items()]
    lines.append(f"stories that mention what was asked for, of {figures['stories']} in all")
    lines += [f"    {group:38s}{share:.1%}" for group, share in figures["honoured"].items()]
    lines.append(f"stories with an invented word             {figures['inventing']} of {figures['stories']}")
    lines.append(
        f"different stories at temperature {TEMPERATURE}      {figures['distinct']:.0%} of {figures['samples']}"
    )
    lines.append(f"perplexity of held-out replies            {figures['perplexity']:.5f}")
    if "perplexity_against" in figures:
        change = figures["perplexity"] / figures["perplexity_against"] - 1
        lines.append(f"    of the other checkpoint               {figures['perplexity_against']:.5f} ({change:+.4%})")
    lines.append(f"seconds                                   {figures['seconds']}")
    return "\n".join(lines)
