"""GGUF files that are refused, or split: one clear line whatever a file holds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.gguf import GgufCheckpoint
from bitnet_numba.checkpoint.gguf_config import KNOWN, MUST_BE_OFF, MUST_BE_ONE, hf_config
from bitnet_numba.checkpoint.gguf_file import Numbers, TensorInfo
from bitnet_numba.checkpoint.gguf_tokenizer import write_tokenizer_files
from bitnet_numba.checkpoint.gguf_types import F32
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.config import ModelConfig
from bitnet_numba.errors import BitNetError, CheckpointError, ConfigError
from tests.conftest import mutate
from tests.gguf_writer import Change, floats, gguf, set_keys, small_model, write
from tests.strategies import byte_edits
from tools.convert import main


def drop(name: str) -> Change:
    return lambda metadata, tensors: (metadata if name in metadata else tensors).pop(name)  # type: ignore[func-returns-value]


def retype(name: str, kind: int) -> Change:
    return lambda metadata, tensors: tensors.update({name: (kind, tensors[name][1], tensors[name][2])})


REFUSED: dict[str, tuple[Change, str]] = {
    "another architecture": (
        set_keys(general__architecture="mamba"),
        r"architecture 'mamba' is not supported \(one of bitnet, .*\)$",
    ),
    "Bonsai 27B": (
        set_keys(general__architecture="qwen35"),
        r"architecture 'qwen35' is not supported: the gated delta net layers of .*\(Bonsai 27B\) are missing here$",
    ),
    "BitCPM4": (
        set_keys(general__architecture="minicpm"),
        r"architecture 'minicpm' is not supported: the scaled embedding, .*\(BitCPM4\) are missing here$",
    ),
    "no architecture": (drop("general.architecture"), "architecture null is not supported"),
    "an adapter": (set_keys(general__type="adapter"), "holds no model: general.type = 'adapter'"),
    "rotated weights": (
        set_keys(prism__hadamard__block_size=512),
        r"weights are rotated \(prism.hadamard.block_size\), and the transform for that is missing here$",
    ),
    "a missing key": (drop("llama.block_count"), "llama: block_count is missing"),
    "a key of another type": (set_keys(llama__block_count="two"), "block_count must be an integer, not 'two'"),
    "many layers": (set_keys(llama__block_count=4000), "too few tensors for 4000 layers"),
    "heads": (set_keys(llama__attention__head_count=7), "128 rows of blk.0.attn_q.weight do not fit 7 heads"),
    "no heads": (set_keys(llama__attention__head_count=0), "do not fit 0 heads"),
    "other heads": (set_keys(llama__attention__key_length=64), "key_length = 64 is not supported, since heads have 32"),
    "partial rotation": (set_keys(llama__rope__dimension_count=16), "dimension_count = 16 is not supported"),
    "longrope": (set_keys(llama__rope__scaling__type="longrope"), "rope.scaling.type = 'longrope' is not supported"),
    "yarn of what": (set_keys(llama__rope__scaling__type="yarn"), "rope.scaling.original_context_length is missing"),
    "experts": (set_keys(llama__expert_count=8), "expert_count = 8 is not supported"),
    "attention both ways": (set_keys(llama__attention__causal=False), "attention.causal = False is not supported"),
    "scaled logits": (set_keys(llama__logit_scale=0.5), "logit_scale = 0.5 is not supported"),
    "a window": (set_keys(llama__attention__sliding_window=100), "sliding_window = 100 is not supported"),
    "layers that differ": (
        set_keys(llama__feed_forward_length=np.array([256, 128], np.uint32)),
        "feed_forward_length differs from layer to layer",
    ),
    "other rotary factors": (
        lambda metadata, tensors: tensors.update({"rope_freqs.weight": (F32, (16,), floats(np.arange(1, 17)))}),
        "rotary factors in rope_freqs.weight are not those of a Llama 3 model",
    ),
    "too few rotary factors": (
        lambda metadata, tensors: tensors.update({"rope_freqs.weight": (F32, (3,), floats([1, 2, 3]))}),
        "rotary factors in rope_freqs.weight are not those",
    ),
    "a scale beside the weights": (
        lambda metadata, tensors: tensors.update({"blk.0.attn_q.scale": (F32, (1,), floats([-1]))}),
        "blk.0.attn_q.scale must be one positive number",
    ),
    "a scale that is too large": (
        lambda metadata, tensors: tensors.update(
            {
                "blk.0.attn_q.weight": (F32, (128, 128), floats([3e38] * 128 * 128)),
                "blk.0.attn_q.scale": (F32, (), floats(3e38)),
            }
        ),
        "blk.0.attn_q.scale must be one positive number",
    ),
    "scales beside the weights": (
        lambda metadata, tensors: tensors.update({"blk.0.attn_q.scale": (F32, (128,), floats([1] * 128))}),
        r"blk.0.attn_q.scale has shape \[128\], expected \[1\]",
    ),
    "infinity in the embedding": (
        lambda metadata, tensors: tensors.update(
            {"token_embd.weight": (8, (260, 128), (b"\0\x7c" + bytes(32)) * (260 * 4))}
        ),
        "token_embd.weight holds NaN or infinity",
    ),
    "a missing tensor": (drop("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
    "no embedding": (drop("token_embd.weight"), "tensor token_embd.weight is missing"),
    "an unexpected tensor": (
        lambda metadata, tensors: tensors.update({"blk.0.\x1b.weight": (F32, (1,), floats([1]))}),
        r"unexpected tensor blk.0.\\x1b.weight",
    ),
    "a shape": (
        lambda metadata, tensors: tensors.update({"output_norm.weight": (F32, (64,), floats(np.ones(64)))}),
        r"output_norm.weight has shape \[64\], expected \[128\]",
    ),
    "too few bytes": (retype("blk.0.attn_q.weight", 42), "tensors blk.0.attn_q.weight and .* overlap"),
    "a code beyond ternary": (
        lambda metadata, tensors: tensors.update(
            {"blk.0.attn_q.weight": (42, (128, 128), (b"\x00\x3c" + b"\x1b" * 16) * 256)}
        ),
        "blk.0.attn_q.weight is not ternary weights times a scale for each row and 128 columns",
    ),
    "TL1": (retype("blk.0.attn_q.weight", 38), "type TL1, .*: its tiles depend"),
    "TL2": (retype("blk.0.attn_q.weight", 39), "type TL2 or MXFP4, .*: its tiles depend"),
    "an unknown type": (retype("token_embd.weight", 999), "token_embd.weight has type 999, which is not supported$"),
    "no ternary model": (
        lambda metadata, tensors: tensors.update({"blk.0.attn_q.weight": (8, (128, 128), bytes(128 * 4 * 34))}),
        "blk.0.attn_q.weight has type Q8_0, so this is no ternary model",
    ),
    "not a number": (
        lambda metadata, tensors: tensors.update({"output_norm.weight": (F32, (128,), floats([np.nan] * 128))}),
        "output_norm.weight holds NaN or infinity",
    ),
    "not a number in the embedding": (
        lambda metadata, tensors: tensors.update({"token_embd.weight": (F32, (260, 128), floats([np.nan] * 33280))}),
        "token_embd.weight holds NaN or infinity",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    change, reason = REFUSED[case]
    path = write(tmp_path / "m.gguf", change=change)
    with pytest.raises((CheckpointError, ConfigError), match=reason) as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value) and "m.gguf" in str(caught.value)
    assert not (tmp_path / "out").exists()


KEYS = [
    *small_model()[0],
    *(f"llama.{key}" for key in sorted(MUST_BE_OFF | KNOWN | MUST_BE_ONE)),
    *("general.type", "tokenizer.chat_template", "prism.hadamard.x"),
    *(f"tokenizer.ggml.{key}" for key in ("scores", "add_bos_token", "eot_token_id", "add_space_prefix")),
]
VALUES: list[Any] = [
    *map(Numbers, (np.zeros(0, np.float32), np.array([1, 2], np.int32), np.array([0.5]), np.array([True, False]))),
    *([], ["a", "\x1b"], "", "\x1btext", "2" * 5000, 0, 1, 7, 2.5, float("nan"), float("inf"), True, False),
    *(4_000_000_000, 2**64 - 1, -(2**63), 1e300),
]


INFOS = {name: TensorInfo(kind, shape, 0, len(data)) for name, (kind, shape, data) in small_model()[1].items()}


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_any_type_is_read_or_refused(tmp_path: Path, key: str) -> None:
    """Whatever stands under a key: one line, never a traceback."""
    metadata: dict[str, Any] = {}
    for name, of in small_model()[0].items():
        metadata[name] = Numbers(of) if isinstance(of, np.ndarray) else of
    for value in VALUES:
        metadata[key] = value
        try:
            if key.startswith("tokenizer."):
                write_tokenizer_files(metadata, tmp_path, "m.gguf")
            else:
                ModelConfig.from_hf(hf_config(metadata, INFOS, None, False, "m.gguf")[0])
        except BitNetError as error:
            assert str(error).isprintable() and len(str(error)) < 400, value


@pytest.mark.parametrize("key", ["general.alignment", "split.count", "split.no", "split.tensors.count"])
def test_a_value_of_any_type_in_the_container(tmp_path: Path, key: str) -> None:
    for value in VALUES:
        keys = {"split.no": np.uint16(0), "split.count": np.uint16(2)} | {
            key: value.values if isinstance(value, Numbers) else np.float64(value) if type(value) is float else value
        }
        path = write(tmp_path / "m-00001-of-00002.gguf", change=lambda metadata, _, keys=keys: metadata.update(keys))
        try:
            GgufCheckpoint(path)
        except BitNetError as error:
            assert str(error).isprintable() and len(str(error)) < 600, value


def split(folder: Path, count: int, **changes: Any) -> list[Path]:
    """A small model in several files."""
    metadata, tensors, _ = small_model()
    names, paths = list(tensors), []
    for i in range(count):
        keys = {"split.no": np.uint16(i), "split.count": np.uint16(count), "split.tensors.count": len(names)} | changes
        part = {name: tensors[name] for name in names[i::count]}
        paths.append(folder / f"m-{i + 1:05}-of-{count:05}.gguf")
        paths[-1].write_bytes(gguf(metadata | keys if i == 0 else keys, part))
    return paths


def test_split_files(tmp_path: Path) -> None:
    convert(write(tmp_path / "whole.gguf"), tmp_path / "whole")
    paths = split(tmp_path, 3)
    for i in (0, 2):  # whichever is named
        convert(paths[i], tmp_path / f"from-{i}")
        one, other = open_packed(tmp_path / "whole"), open_packed(tmp_path / f"from-{i}")
        assert all(np.array_equal(one.tensor(name), other.tensor(name)) for name in one.names)


def test_files_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    repository = tmp_path / "snapshot"
    repository.mkdir()
    write(repository / "m.gguf")
    split(repository, 2)
    asked = []

    def snapshot_download(name: str, revision: str, allow_patterns: list[str], **options: object) -> str:
        asked.append((name, revision, allow_patterns))
        return str(repository)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("bitnet_numba.hub.download.why_not_reachable", lambda model: None)
    assert main(["someone/tiny-gguf/m.gguf", str(tmp_path / "out"), "--revision", "v1"]) == 0
    assert main(["someone/tiny-gguf/m-00001-of-00002.gguf", str(tmp_path / "parts")]) == 0
    parts = ["m-*-of-00002.gguf"]
    assert asked == [("someone/tiny-gguf", "v1", ["m.gguf"]), ("someone/tiny-gguf", "main", parts)]
    capsys.readouterr()
    for source, reason in (
        ("someone/tiny-gguf/n.gguf", "someone/tiny-gguf has no file n.gguf"),
        ("someone/tiny-gguf", "has no config.json; for a GGUF file in it, name someone/tiny-gguf/FILE.gguf"),
        (str(repository), "snapshot has no config.json, but GGUF files: name one, such as "),
        ("none.gguf", "none.gguf does not exist"),
    ):
        assert main([source, str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert reason in error and error.count("\n") == 1


def test_a_file_that_is_not_converted(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    with pytest.raises(CheckpointError, match=r"m.gguf is not a folder; run  bitnet-numba convert .*m.gguf DST  first"):
        open_packed(path)


def test_split_files_that_do_not_belong_together(tmp_path: Path) -> None:
    def refused(reason: str, path: Path) -> None:
        with pytest.raises(CheckpointError, match=reason) as caught:
            GgufCheckpoint(path)
        assert "\n" not in str(caught.value)

    first, second, third = split(tmp_path, 3)
    third.unlink()
    refused("m-00003-of-00003.gguf does not exist", first)
    third.write_bytes(second.read_bytes())
    refused("m-00003-of-00003.gguf is not file 3 of 3, as its name says", first)
    _, tensors, _ = small_model()
    keys = {"split.no": np.uint16(2), "split.count": np.uint16(3)}
    third.write_bytes(gguf(keys, {}))
    refused(r"the 3 files hold 14 tensors, not 20", first)
    split(tmp_path, 3, **{"split.tensors.count": 21})
    third.write_bytes(gguf(keys, dict(list(tensors.items())[1::3])))
    refused("tensor .* is in m-00002-of-00003.gguf and in m-00003-of-00003.gguf", first)
    first.rename(tmp_path / "renamed.gguf")
    refused("renamed.gguf is one of 3 files, but not named like NAME-00001-of-00003.gguf", tmp_path / "renamed.gguf")


SMALL = gguf(*small_model()[:2])


@given(edits=byte_edits(3))
def test_any_damage_is_an_error_or_another_model(
    edits: list[tuple[float, bytes]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(mutate(SMALL, edits, SMALL.index(b"tokenizer.ggml.model")))
    try:
        GgufCheckpoint(path)
    except BitNetError as error:
        assert "\n" not in str(error)
