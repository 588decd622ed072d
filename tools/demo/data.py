"""Tokenizer and training rows of the demo model, from the text world in `tools/demo/world`."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from bitnet_numba.text.chat_template import BITNET_TEMPLATE
from bitnet_numba.text.tiktoken import SPLIT_PATTERN
from tools.demo.model import BOS, CONTEXT, END, EOT, VOCAB
from tools.demo.world import nouns
from tools.demo.world.conversation import QUESTION, Turn, conversation
from tools.demo.world.draw import THINGS

# Stories have most of the tokens, and most of their loss is the choice among plots and words. Answers are what can be
# right.
ANSWER_WEIGHT, SHORT = 2, 64

SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|reserved_special_token_4|>", "<|eot_id|>",
]  # fmt: skip


def train_tokenizer(folder: Path, seed: int) -> None:
    """A byte-level BPE of the world's text, with the special tokens of Llama 3 at the end of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        # Every noun often enough to become one token: what is one piece cannot be misspelt.
        for noun in 60 * (nouns.ANIMALS + THINGS + nouns.FOODS + list(nouns.PLACES)):
            yield f"the {noun}"
        for i in range(4000):
            for turn in itertools.islice(conversation(Random(seed * 1_000_003 + i)), 16):
                yield f"User: {turn.user}"
                yield f"Assistant: {turn.assistant}"

    tokenizer.train_from_iterator(texts(), trainer)
    if tokenizer.get_vocab_size() != VOCAB - len(SPECIAL_TOKENS):
        raise SystemExit(f"the tokenizer found only {tokenizer.get_vocab_size()} tokens in its training text")
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A <|begin_of_text|> $B",
        special_tokens=[("<|begin_of_text|>", BOS)],
    )  # fmt: skip
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "added_tokens_decoder": {str(BOS + i): {"content": t, **flags} for i, t in enumerate(SPECIAL_TOKENS)},
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": BITNET_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


_tokenizer: Tokenizer


def start_worker(path: str) -> None:
    """Initialise a process that calls `make_rows`."""
    global _tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _tokenizer = Tokenizer.from_file(path)


def encode_conversation(tokenizer: Tokenizer, rng: Random, turns: Iterator[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of one row, and the weight of each in the loss: 0 for what the assistant does not say.

    Ends before the turn that no longer fits.

    The prompt ends in "Assistant: ", so the first word of a generated reply has no space of its own; re-encoding the
    whole conversation as one text joins the two. The model should know earlier turns in either form.
    """
    ids, said = [BOS], [0]
    for turn in turns:
        before, reply = f"User: {turn.user}<|eot_id|>Assistant: ", turn.assistant
        if rng.random() < 0.25:
            before, reply = before[:-1], " " + reply
        asked, answered = (e.ids for e in tokenizer.encode_batch([before, reply], add_special_tokens=False))
        if len(ids) + len(asked) + len(answered) + 1 > CONTEXT + 1:
            break
        ids += asked + answered + [EOT]
        weight = ANSWER_WEIGHT if turn.kind == QUESTION and len(answered) < SHORT else int(turn.learned)
        said += [0] * len(asked) + [weight] * (len(answered) + 1)
    return ids, said


def make_rows(job: tuple[int, int, bool], tokenizer: Tokenizer | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of conversations: ids uint16 and loss weights uint8, each [count, CONTEXT + 1].

    `job` is (seed, count, evaluation); row i depends on seed + i alone. Without `tokenizer`, that of `start_worker`.
    """
    seed, count, evaluation = job
    ids = np.full((count, CONTEXT + 1), END, dtype=np.uint16)
    weights = np.zeros((count, CONTEXT + 1), dtype=np.uint8)
    for row in range(count):
        rng = Random(seed + row)
        tokens, said = encode_conversation(tokenizer or _tokenizer, rng, conversation(rng, evaluation))
        ids[row, : len(tokens)] = tokens
        weights[row, : len(said)] = said
    return ids, weights
