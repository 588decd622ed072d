"""Judges a model that has just been trained, in PyTorch and before it is packed: quick on a GPU."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random

import numpy as np
import torch
from tokenizers import Tokenizer

from tools.demo.cases import GROUPS, Case, exact_shares, invented_words, lacking, question_cases, request_cases
from tools.demo.data import WordEncoder, encode_conversation, make_rows
from tools.demo.model import BitNet
from tools.demo.size import CONTEXT, END, EOT

EVALUATION_SEED = 1 << 40  # far from every training seed
SAMPLING = {"temperature": 1.0, "min_p": 0.1}  # the model's own defaults


def _chosen(logits: torch.Tensor, temperature: float, min_p: float) -> torch.Tensor:
    """One token for each row of logits [B, V]: the likeliest at temperature 0, otherwise drawn as min_p says."""
    if temperature == 0:
        return logits.argmax(-1)
    probability = torch.softmax(logits / temperature, -1)
    probability[probability < min_p * probability.amax(-1, keepdim=True)] = 0
    return torch.multinomial(probability, 1)[:, 0]


@torch.no_grad()
def generate(
    model: BitNet, prompts: list[list[int]], new_tokens: int, temperature: float = 0.0, min_p: float = 0.0
) -> list[list[int]]:
    """Replies to a batch of prompts, without a cache: simple, and quick enough for an evaluation."""
    device = model.embed_tokens.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    ids = torch.full((len(prompts), int(lengths.max()) + new_tokens), END, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    at, rows = lengths.clone(), torch.arange(len(prompts), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    while not done.all() and int(at.max()) < min(ids.shape[1], CONTEXT):
        hidden = model(ids[:, : int(at.max())])
        token = _chosen(model.head(hidden[rows, at - 1]).float(), temperature, min_p)
        ids[rows, at] = torch.where(done, ids[rows, at], token)
        at = at + (~done).long()
        done |= (token == EOT) | (token == END) | (at - lengths >= new_tokens)
    return [ids[i, lengths[i] : at[i]].tolist() for i in range(len(prompts))]


def replies(
    model: BitNet, tokenizer: Tokenizer, cases: list[Case], batch: int, new_tokens: int = 0, **sampling: float
) -> Iterator[tuple[Case, str]]:
    """The model's reply in each case, of `new_tokens` at most, or of somewhat more than the right reply has."""

    encoder = WordEncoder(tokenizer)

    def encoded(case: Case) -> tuple[int, list[int]]:
        prompt, _ = encode_conversation(encoder, Random(0), iter(case.before))
        asked = f"User: {case.turn.user}<|eot_id|>Assistant: "
        limit = new_tokens or len(tokenizer.encode(case.turn.assistant, add_special_tokens=False).ids) + 24
        return limit, prompt + tokenizer.encode(asked, add_special_tokens=False).ids

    prepared = sorted(((*encoded(case), case) for case in cases), key=lambda entry: (entry[0] // 32, len(entry[1])))
    for start in range(0, len(prepared), batch):
        part = prepared[start : start + batch]
        longest = max(limit for limit, _, _ in part)
        for (_, _, case), ids in zip(part, generate(model, [p for _, p, _ in part], longest, **sampling), strict=True):
            yield case, tokenizer.decode(ids)


def perplexity(model: BitNet, tokenizer: Tokenizer) -> float:
    """exp of the mean loss of held-out replies."""
    ids, weights = make_rows((EVALUATION_SEED + (1 << 30), 32, True), WordEncoder(tokenizer))
    device = model.embed_tokens.device
    with torch.no_grad():
        losses = [
            model.loss(
                torch.from_numpy(ids[i : i + 8].astype(np.int64)).to(device),
                torch.from_numpy(weights[i : i + 8]).to(device),
            ).item()
            for i in range(0, len(ids), 8)
        ]
    return math.exp(sum(losses) / len(losses))


def evaluate(model: BitNet, tokenizer: Tokenizer, per_group: int, stories: int, batch: int = 128) -> dict[str, object]:
    """Exact replies in each group of questions, requests honoured and words invented by sampled stories, perplexity."""
    answered: list[tuple[Case, str]] = []
    for group in GROUPS:
        part = list(replies(model, tokenizer, question_cases(per_group, EVALUATION_SEED, (group,)), batch))
        print(f"{group:16s} {exact_shares(part)[group]:.1%}", flush=True)
        for case, reply in part:
            if not case.turn.right(reply):
                print(f"  {case.turn.user!r}: {reply[:200]!r}, not {case.turn.assistant[:200]!r}", flush=True)
        answered += part
    told = list(replies(model, tokenizer, request_cases(stories, EVALUATION_SEED), 2 * batch, 500, **SAMPLING))
    missed = [(case, reply) for case, reply in told if lacking(case, reply)]
    for case, reply in missed:
        print(f"  missing of {case.turn.mentions} ({case.group}): {reply[:120]!r}")
    inventing = [(case, words) for case, reply in told if (words := invented_words(case, reply))]
    for case, words in inventing:
        print(f"  invented {sorted(words)} when asked {case.turn.user!r}")
    for case, reply in told[:3]:
        print(f"  {case.turn.user}\n{reply}\n")
    return {
        "exact": exact_shares(answered),
        "stories": len(told),
        "honoured": {g: 1 - sum(c.group == g for c, _ in missed) / sum(c.group == g for c, _ in told)
                     for g in sorted({case.group for case, _ in told})},
        "inventing": len(inventing),
        "perplexity": perplexity(model, tokenizer),
    }  # fmt: skip
