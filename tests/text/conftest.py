"""The recorded tokenizer, and copies of it that a test may change."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers

from bitnet_numba.text import chat_template, template_process
from bitnet_numba.text.tokenizer import Tokenizer
from tests.conftest import GOLDEN

FOLDER = GOLDEN / "tokenizer"
TOKENIZER = Tokenizer.open(FOLDER)
BOS, EOS, EOT = 1990, 1991, 1999
HI = [{"role": "user", "content": "Hi."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the golden tokenizer that a test may change."""
    return Path(shutil.copytree(FOLDER, tmp_path / "model"))


def set_config(folder: Path, **changes: Any) -> Path:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    return folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Templates get 0.3 seconds, in a process of their own."""
    own = template_process.TemplateProcess(seconds=0.3)
    monkeypatch.setattr(chat_template, "PROCESS", own)
    yield
    own.stop()


def sentencepiece_like() -> tokenizers.Tokenizer:
    """A small vocabulary of the sentencepiece kind: a space before the first word, bytes for unknown characters."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [*"\u2581abcdehlorw.", "he", "ll", "hell", "hello", "\u2581hello", "\u2581w", "or", "ld"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("\u2581", "hello"), ("\u2581", "w"), ("o", "r")]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def edit_tokenizer(folder: Path, **changes: Any) -> Path:
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"] |= changes.pop("model", {})
    (folder / "tokenizer.json").write_text(json.dumps(raw | changes))
    return folder
