"""Folders whose tokenizer is missing, damaged, or would end the process that opens it."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_numba.errors import TokenizerError
from bitnet_numba.text import tokenizer_files
from bitnet_numba.text.tokenizer import Tokenizer
from bitnet_numba.text.tokenizer_files import try_once
from tests.text.conftest import EOS, EOT, FOLDER, HI, TOKENIZER, edit_tokenizer, sentencepiece_like


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no tokenizer\.json"):
        Tokenizer.open(tmp_path)


def test_a_tokenizer_larger_than_the_embedding_is_refused(folder: Path) -> None:
    with pytest.raises(TokenizerError, match="1990 tokens, but the model has embeddings for 1989"):
        Tokenizer.open(FOLDER, 1989)
    with pytest.raises(TokenizerError, match="the first token of texts is 1990, but the model has 1990"):
        Tokenizer.open(FOLDER, 1990)
    # Tokens that were added beyond the vocabulary, for padding, do no harm until a prompt has them.
    assert Tokenizer.open(FOLDER, 1991).encode("x") == TOKENIZER.encode("x")


DAMAGED = [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_generation_config_is_ignored_and_told(
    folder: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "generation_config.json").write_bytes(content)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert Tokenizer.open(folder).stop_ids == {7, EOS, EOT}
    assert len(caplog.messages) == 1 and "generation_config.json" in caplog.messages[0]


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", DAMAGED)
def test_damaged_files_are_named(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=name) as caught:
        Tokenizer.open(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_decoder_is_refused(folder: Path) -> None:
    edit_tokenizer(folder, decoder={"type": "WordPiece", "prefix": "##", "cleanup": True})
    with pytest.raises(TokenizerError, match="decoder of type WordPiece"):
        Tokenizer.open(folder)


def test_an_affix_the_library_would_die_of_is_refused(folder: Path) -> None:
    edit_tokenizer(folder, model={"continuing_subword_prefix": "x"})
    with pytest.raises(TokenizerError, match="continuing_subword_prefix is not supported"):
        Tokenizer.open(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"model": {"merges": [["a", "\x1b[31m"]]}}, r"\\x1b\[31m"),
        # This one aborts the process (tokenizers 0.23), or is refused.
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "Isolated"}}, "exit code|recompiled"),
    ],
)
def test_a_tokenizer_that_ends_a_process_does_not_end_this_one(
    folder: Path, changes: Any, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    edit_tokenizer(folder, **changes)
    with pytest.raises(TokenizerError, match=f"tokenizer.json is damaged: .*({reason})") as caught:
        Tokenizer.open(folder, trial=True)
    assert str(caught.value).isprintable() and capfd.readouterr() == ("", "")


def test_an_affix_is_refused_however_its_name_is_written(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        escaped = f"\\u{ord(name[0]):04x}{name[1:]}"
        assert text.count(f'"{name}": null') + text.count(f'"{name}":null') == 1
        changed = text.replace(f'"{name}": null', f'"{escaped}": "x"').replace(f'"{name}":null', f'"{escaped}":"x"')
        (folder / "tokenizer.json").write_text(changed)
        with pytest.raises(TokenizerError, match=f"{name} is not supported"):
            Tokenizer.open(folder)


def test_what_has_passed_is_not_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def try_in_child(data: bytes, name: object) -> bool:
        tried.append(data)
        return True

    monkeypatch.setattr(tokenizer_files, "try_in_child", try_in_child)
    passed = tmp_path / "cache" / "tokenizers"
    for _ in range(2):
        Tokenizer.open(folder, trial=True, passed=passed)
    assert len(tried) == len(list(passed.iterdir())) == 1
    edit_tokenizer(folder, model={"fuse_unk": True})
    Tokenizer.open(folder, trial=True, passed=passed)
    assert len(tried) == 2
    (tmp_path / "file").touch()  # where nothing can be noted
    for _ in range(2):
        Tokenizer.open(folder, trial=True, passed=tmp_path / "file" / "tokenizers")
    assert len(tried) == 4


def test_what_could_not_be_tried_has_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed = tmp_path / "tokenizers"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    try_once(b"{}", "tokenizer.json", passed)
    assert not passed.exists()
    monkeypatch.undo()
    with pytest.raises(TokenizerError, match="damaged"):
        try_once(b"{}", "tokenizer.json", passed)


def test_a_folder_of_notes_that_cannot_be_entered_is_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(path: object, *_: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(tokenizer_files, "try_in_child", lambda data, name: True)
    monkeypatch.setattr(os, "stat", forbidden)
    monkeypatch.setattr(os, "mkdir", forbidden)
    try_once(b"{}", "tokenizer.json", tmp_path / "closed")
    monkeypatch.undo()
    assert not (tmp_path / "closed").exists()


def test_a_trial_lets_a_good_tokenizer_pass() -> None:
    assert Tokenizer.open(FOLDER, trial=True).encode("x") == TOKENIZER.encode("x")


def mutated(value: Any, draw: st.DrawFn) -> Any:
    """A JSON value with one place changed or removed."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
        place = draw(st.sampled_from(range(len(value)) if isinstance(value, list) else sorted(value)))
        changed = value.copy()
        if isinstance(changed, dict) and not draw(st.integers(0, 4)):
            del changed[place]
        else:
            changed[place] = mutated(changed[place], draw)
        return changed
    wrong = [None, True, -1, 0, 3.5, 1e400, 2**80, "", "x", "\ud800", "{{", [], [1], {}, {"a": 1}, {"content": 5}]
    return draw(st.sampled_from(wrong))


@given(data=st.data(), name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
def test_mutated_json_raises_our_error_or_opens(small_folder: Path, data: st.DataObject, name: str) -> None:
    target = Path(shutil.copytree(small_folder, small_folder.with_name("mutated"), dirs_exist_ok=True))
    original = json.loads((small_folder / name).read_text())
    (target / name).write_text(json.dumps(mutated(original, data.draw)))
    try:
        tokenizer = Tokenizer.open(target, 2000)
        assert isinstance(tokenizer.decode(tokenizer.encode_chat(HI)), str)
    except TokenizerError as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(target)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer small enough to be damaged byte by byte, many times."""
    folder = tmp_path_factory.mktemp("small")
    sentencepiece_like().save(str(folder / "tokenizer.json"), pretty=False)
    shutil.copy(FOLDER / "tokenizer_config.json", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 1}')
    return folder


@given(data=st.data())
def test_mutated_bytes_raise_our_error_or_open(small_folder: Path, data: st.DataObject) -> None:
    original = (small_folder / "tokenizer.json").read_bytes()
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    target = small_folder.with_name("damaged")
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_bytes(damaged[: data.draw(st.integers(1, len(damaged)))])
    try:
        tokenizer = Tokenizer.open(target)
        tokenizer.decode(tokenizer.encode("hello world"))
    except TokenizerError as error:
        assert "\n" not in str(error)
