"""What the files of a model folder say about its tokenizer: the tokenizer itself, special tokens, ends of answers."""

import contextlib
import hashlib
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from bitnet_numba.errors import TokenizerError, one_line, printable
from bitnet_numba.json_file import read_json
from bitnet_numba.model_folder import ModelFile, ModelFolder
from bitnet_numba.text.chat_template import without_surrogates

_log = logging.getLogger("bitnet_numba")
_ESCAPED = re.compile(rb"\\u00([4-7][0-9a-fA-F])")  # of a letter, which no writer of JSON escapes
_AFFIX = re.compile(rb'"(continuing_subword_prefix|end_of_word_suffix)"\s*:\s*"[^"]')
# Opens a tokenizer, encodes and decodes with it: what a damaged one dies of, it dies of here.
_TRIAL = """
import sys
sys.path.append(sys.argv[1])
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))
except (ImportError, OSError, ValueError):
    pass
import tokenizers
try:
    backend = tokenizers.Tokenizer.from_buffer(sys.stdin.buffer.read())
    backend.no_truncation()
    backend.no_padding()
    texts = ["", " ", "Hello,  world!\\n\\n\\t123", "\\u00e9\\u4e2d\\U0001f642\\u0301\\x00\\x7f", "x" * 100]
    texts += [token.content for token in backend.get_added_tokens_decoder().values()][:1000]
    for special in (False, True):
        for text in texts:
            backend.decode(backend.encode(text, add_special_tokens=special).ids)
except BaseException as error:
    print((str(error) or type(error).__name__)[:1000])
    sys.exit(1)
"""
_TRIAL_SECONDS = 60


def load_backend(data: bytes, name: object) -> tokenizers.Tokenizer:
    """The `tokenizers` object of a tokenizer.json, which encodes a text always alike and completely.

    As in transformers, truncation and padding that the file stores are not applied; nor is dropout, which is for
    training. Raises TokenizerError, naming the file, if it is damaged or of a kind that is not supported.
    """
    with library_errors(f"{name} is damaged"):
        # With an affix that the vocabulary does not match, the library aborts the process; no BitNet model has one.
        if affix := _AFFIX.search(_ESCAPED.sub(lambda escape: bytes([int(escape[1], 16)]), data)):
            raise TokenizerError(f"{name}: {affix[1].decode()} is not supported")
        backend = tokenizers.Tokenizer.from_buffer(data)
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None
        return backend


def try_once(data: bytes, name: object, passed: Path | None) -> None:
    """As `try_in_child`, unless this tokenizer.json has passed before.

    passed: the folder that notes it, if it can be written; None: nothing is noted.
    """
    if passed is None:
        try_in_child(data, name)
        return
    note = passed / hashlib.sha256(f"{tokenizers.__version__};{_TRIAL};".encode() + data).hexdigest()
    if not os.path.exists(note) and try_in_child(data, name):  # `Path.exists` raises where a folder cannot be entered
        with contextlib.suppress(OSError):
            passed.mkdir(parents=True, exist_ok=True)
            note.touch()


def try_in_child(data: bytes, name: object) -> bool:
    """Opens a tokenizer.json in another process. Raises TokenizerError if that one dies of it, or takes too long.

    False: nothing was tried, since Python could not be started.
    """
    if not sys.executable or getattr(sys, "frozen", False):
        return False
    spec = importlib.util.find_spec("tokenizers")
    assert spec is not None and spec.origin is not None
    site = str(Path(spec.origin).parent.parent)
    try:
        command = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _TRIAL, site]
        process = subprocess.run(command, input=data, capture_output=True, timeout=_TRIAL_SECONDS)
    except subprocess.TimeoutExpired:
        raise TokenizerError(f"{name} is damaged: it takes longer than {_TRIAL_SECONDS} seconds to open") from None
    except OSError:
        return False
    if process.returncode:
        reason = " ".join(process.stdout.decode("utf-8", "replace").split())
        reason = printable(reason) or f"it ends the process that opens it (exit code {process.returncode})"
        raise TokenizerError(f"{name} is damaged: {reason}")
    return True


def read_object(path: ModelFile) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    return read_json(path, TokenizerError) if path.exists() else {}


def named_tokens(config: Mapping[str, Any], special_tokens_map: Mapping[str, Any]) -> dict[str, object]:
    """bos_token, eos_token, sep_token and all others, as templates see them: texts, and lists of texts.

    Older folders have them in special_tokens_map.json alone; tokenizer_config.json comes first.
    """
    named: dict[str, object] = {}
    extra = config.get("extra_special_tokens")  # names that a model adds to the usual ones
    for source in (special_tokens_map, config, extra if isinstance(extra, dict) else {}):
        for key, value in source.items():
            if not key.endswith(("_token", "_tokens")):
                continue
            texts = [_text_of(entry) for entry in (value if isinstance(value, list) else [value])]
            if all(text is not None for text in texts):
                named[key] = texts if isinstance(value, list) else texts[0]
    return named


def _text_of(entry: object) -> str | None:
    """The text of a special token, which is stored as it is or as an object."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return without_surrogates(text) if isinstance(text, str) else None


def eos_ids(folder: ModelFolder, size: int) -> frozenset[int]:
    """The ids that end an answer: those of generation_config.json, otherwise those of config.json.

    Ids outside the vocabulary of `size` tokens are ignored with a warning, and so is a file that is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            value = read_object(folder / name).get("eos_token_id")
        except TokenizerError as error:
            _log.warning("%s; ignored", error)
            continue
        if value is not None:
            return _known_ids(value, size, name)
    return frozenset()


def _known_ids(value: object, size: int, name: str) -> frozenset[int]:
    known = set()
    for i in value if isinstance(value, list) else [value]:
        if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size:
            known.add(i)
        else:
            _log.warning("%s: eos_token_id %.60r is not a token of this model; ignored", name, i)
    return frozenset(known)


def is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are in GPT-2's byte alphabet (not sentencepiece's text). TokenizerError for other kinds."""
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder is not None else {}
    kinds = {part.get("type") for part in decoder.get("decoders", [decoder])}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"Metaspace", "ByteFallback"}:
        return False
    kind = printable(str(decoder.get("type")), 60)
    raise TokenizerError(f"tokenizer.json: a decoder of type {kind} is not supported")


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turns any exception of the library into a TokenizerError; its panics derive from BaseException."""
    try:
        yield
    except (TokenizerError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise TokenizerError(f"{what}: {one_line(error)}") from None
