"""Tokenizer and training rows of the demo model, from the text world in `tools/demo/world`."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from bitnet_numba.text.chat_template import BITNET_TEMPLATE
from bitnet_numba.text.tiktoken import SPLIT_PATTERN
from tools.demo.size import BOS, CONTEXT, END, EOT, VOCAB
from tools.demo.world import nouns
from tools.demo.world.conversation import QUESTION, Turn, conversation
from tools.demo.world.draw import PEOPLE, THINGS
from tools.demo.world.lexicon import WORDS

# Stories have most of the tokens, and most of their loss is the choice among plots and words. Answers are what can be
# right.
ANSWER_WEIGHT, SHORT = 2, 128
ASKED_WEIGHT = 4  # of the words that a story must have, and of "he" and "she" in an answer, which only the story tells
DECIDING_WEIGHT = 8  # of "Yes" and "No": one token that is right or wrong, and seven that are easy
_PRONOUN = re.compile(r"\b(?:he|she|him|her|his)\b", re.IGNORECASE)
# `SPLIT_PATTERN`, as far as Python's own module has it.
_WORD = re.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|(?:[^\r\n\w]|_)?[^\W\d_]+|\d{1,3}|"
    r" ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_YES_OR_NO = re.compile(r" ?(?:Yes|No)\b")

SPECIAL_TOKENS = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>", "<|reserved_special_token_3|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|reserved_special_token_4|>", "<|eot_id|>",
]  # fmt: skip


def _vocabulary(pre_tokenizer: pre_tokenizers.PreTokenizer, seed: int) -> list[str]:
    """The world's words as tokens, after the 256 bytes: the commonest, and every noun.

    No other word has a token or a part of one: a word that nobody knows, one with a slip of the finger and one in
    capitals is spelt byte by byte, the same way wherever it stands, and so can be copied, or recognised, by letters.
    """
    texts = [f"the {noun}" for noun in nouns.ANIMALS + PEOPLE + THINGS + nouns.FOODS + list(nouns.PLACES)]
    required = {word for text in texts for word, _ in pre_tokenizer.pre_tokenize_str(text)}
    counts: Counter[str] = Counter()
    for i in range(6000):
        for turn in itertools.islice(conversation(Random(seed * 1_000_003 + i)), 16):
            for text in (f"User: {turn.user}", f"Assistant: {turn.assistant}"):
                counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(text))
    decoder = decoders.ByteLevel()

    def known(token: str) -> bool:
        letters = "".join(re.findall(r"[^\W\d_]+", decoder.decode([token])))
        return (
            not letters
            or token == "Assistant"
            or (letters.lower() in WORDS and (len(letters) == 1 or not letters.isupper()))
        )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Numbers fill what is left.
    order = sorted(counts, key=lambda token: (bool(re.search(r"\d\d", token)), -counts[token], token))
    common = [token for token in order if known(token)]
    wanted = [word for word in [*sorted(required), *common] if len(word) > 1]
    return [*alphabet, *list(dict.fromkeys(wanted))[: VOCAB - len(SPECIAL_TOKENS) - len(alphabet)]]


def train_tokenizer(folder: Path, seed: int) -> None:
    """A byte-level tokenizer of whole words, with the special tokens of Llama 3 at the end of the vocabulary."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    vocabulary = _vocabulary(split, seed)
    # Without merges, what is no token as a whole falls into bytes.
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    if len(vocabulary) != VOCAB - len(SPECIAL_TOKENS):
        raise SystemExit(f"the world has only {len(vocabulary)} words and bytes")
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


class WordEncoder:
    """Encodes the world's text, without special tokens, as the tokenizer does, but remembers each word: quicker.

    No token reaches over the edge of a word, so its ids are the same wherever it stands.
    """

    def __init__(self, tokenizer: Tokenizer):
        def encode(word: str) -> tuple[int, ...]:
            return tuple(tokenizer.encode(word, add_special_tokens=False).ids)

        self._ids_of = lru_cache(maxsize=1 << 16)(encode)

    def words(self, text: str) -> list[tuple[int, tuple[int, ...]]]:
        """For each word, where it ends in `text`, and its token ids."""
        return [(match.end(), self._ids_of(match[0])) for match in _WORD.finditer(text)]

    def ids(self, text: str) -> list[int]:
        return [token for _, tokens in self.words(text) for token in tokens]


_encoder: WordEncoder


def start_worker(path: str) -> None:
    """Initialise a process that calls `make_rows`."""
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = WordEncoder(Tokenizer.from_file(path))


def encode_reply(encoder: WordEncoder, turn: Turn, reply: str) -> tuple[list[int], list[int]]:
    """Token ids of a reply, and the weight of each in the loss."""
    words = encoder.words(reply)
    ids = [token for _, tokens in words for token in tokens]
    base = int(turn.learned)
    asked: Iterable[re.Match[str]] = ()
    if turn.kind == QUESTION:
        base = ANSWER_WEIGHT if len(ids) < SHORT else 1
        asked = _PRONOUN.finditer(reply)
    elif turn.learned and turn.mentions:
        asked = re.finditer(rf"(?<!\w)(?:{'|'.join(map(re.escape, turn.mentions))})(?!\w)", reply)
    weights = [base] * len(reply)  # of each character
    for match in asked:
        # With the space before it, which is a token of its own where the word is spelt out.
        start = max(0, match.start() - 1)
        weights[start : match.end()] = [ASKED_WEIGHT] * (match.end() - start)
    if turn.kind == QUESTION and (decided := _YES_OR_NO.match(reply)):
        weights[: decided.end()] = [DECIDING_WEIGHT] * decided.end()
    return ids, [weights[end - 1] for end, tokens in words for _ in tokens]


def encode_conversation(encoder: WordEncoder, rng: Random, turns: Iterator[Turn]) -> tuple[list[int], list[int]]:
    """Token ids of one row, and the weight of each in the loss: 0 for what the assistant does not say.

    Ends before the turn that no longer fits.

    The prompt ends in "Assistant: ", so the first word of a generated reply has no space of its own; re-encoding the
    whole conversation as one text joins the two. The model should know earlier turns in either form.
    """
    ids, said = [BOS], [0]
    for turn in turns:
        before, reply = "Assistant: ", turn.assistant
        if rng.random() < 0.25:
            before, reply = "Assistant:", " " + reply
        asked = [*encoder.ids(f"User: {turn.user}"), EOT, *encoder.ids(before)]
        answered, weights = encode_reply(encoder, turn, reply)
        if len(ids) + len(asked) + len(answered) + 1 > CONTEXT + 1:
            break
        ids += [*asked, *answered, EOT]
        said += [0] * len(asked) + weights + weights[-1:]
    return ids, said


def make_rows(job: tuple[int, int, bool], encoder: WordEncoder | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of conversations: ids uint16 and loss weights uint8, each [count, CONTEXT + 1].

    `job` is (seed, count, evaluation); row i depends on seed + i alone. Without `encoder`, that of `start_worker`.
    """
    seed, count, evaluation = job
    ids = np.full((count, CONTEXT + 1), END, dtype=np.uint16)
    weights = np.zeros((count, CONTEXT + 1), dtype=np.uint8)
    for row in range(count):
        rng = Random(seed + row)
        tokens, said = encode_conversation(encoder or _encoder, rng, conversation(rng, evaluation))
        ids[row, : len(tokens)] = tokens
        weights[row, : len(said)] = said
    return ids, weights
