"""Models with Gemma 3's block, from folders and from GGUF files."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitnet_numba.backends.reference import reference_backend
from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.checkpoint.convert import convert
from bitnet_numba.checkpoint.gguf import GgufCheckpoint
from bitnet_numba.checkpoint.gguf_config import hf_config
from bitnet_numba.checkpoint.huggingface import HuggingFaceCheckpoint
from bitnet_numba.checkpoint.packed import open_packed
from bitnet_numba.config import ModelConfig
from bitnet_numba.config_rope import LocalAttention
from bitnet_numba.engine.embedding import unit_vectors
from bitnet_numba.errors import CheckpointError
from tests.conftest import GOLDEN
from tests.engine.test_embedding import packed_model
from tools.make_checkpoint import PRESETS, make_checkpoint

FILE = GOLDEN / "embedding-gemma/i2_s.gguf"
NORMS = {
    "input_norm": "input_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "post_attention_norm": "pre_feedforward_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}


def test_norms_of_a_folder_are_what_they_differ_from_1(tmp_path: Path) -> None:
    weight_format, config = PRESETS["embedding-270m"]
    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 300, "num_hidden_layers": 2}
    make_checkpoint(tmp_path / "source", config | sizes, weight_format)
    convert(tmp_path / "source", tmp_path / "packed")
    source, packed = HuggingFaceCheckpoint(tmp_path / "source"), open_packed(tmp_path / "packed")
    for ours, theirs in NORMS.items():
        weight = packed.tensor(f"layers.1.{ours}.weight")
        assert np.array_equal(weight, source.take_floats(f"model.layers.1.{theirs}.weight", weight.shape) + 1)
    assert np.array_equal(packed.tensor("norm.weight"), source.take_floats("model.norm.weight", (64,)) + 1)
    norms = packed.tensor("layers.1.qkv.norms")  # linears' own are weights
    assert np.array_equal(norms[2], source.take_floats("model.layers.1.self_attn.v_proj.norm.weight", (64,)))
    assert packed.config.window_of(1) == 512


def test_a_file_names_its_window_or_has_none() -> None:
    file = GgufCheckpoint(FILE)
    assert file.config.gemma and file.config.embeds and file.config.local is None and file.config.rope_theta == 1e6

    def local(**keys: Any) -> LocalAttention | None:
        named = {f"gemma3.{key.replace('__', '.')}": value for key, value in keys.items()}
        raw, notes = hf_config({**file.metadata, **named}, file._infos, None, False, "file")
        assert notes == []
        return ModelConfig.from_hf(raw).local

    assert local(attention__sliding_window=0) is None
    assert local(attention__sliding_window=9) == LocalAttention(9, 1e4, (True, True))
    (note,) = hf_config(file.metadata, file._infos, None, False, "file")[1]
    assert note.startswith("gemma3.attention.sliding_window is missing, so that all layers attend to whole texts")
    changes = {"attention__sliding_window": 9, "attention__sliding_window_pattern": 2, "rope__freq_base_swa": 2e4}
    assert local(**changes) == LocalAttention(9, 2e4, (True, False))


def test_a_file_holds_the_weights_of_the_folder(tmp_path: Path) -> None:
    """But for what float16 leaves of norms, and of the smallest embeddings; and it computes without a window."""
    convert(FILE, tmp_path / "file")
    file, folder = open_packed(tmp_path / "file"), open_packed(packed_model("embedding-gemma", tmp_path))
    assert file.names == folder.names
    for name in file.names:
        found, expected = file.tensor(name), folder.tensor(name)
        if name.endswith(".scales"):  # means, summed up in another order
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        elif name.endswith((".words", ".norms")):
            assert np.array_equal(found, expected), name
        elif name == "embed.weight":
            np.testing.assert_allclose(to_float32(found), to_float32(expected), rtol=0, atol=2.0**-25)
        else:
            np.testing.assert_allclose(found, expected, rtol=2.0**-11)
    without = replace(folder, config=replace(folder.config, local=None))
    texts = [[2, 100, 7, 1]]
    vectors = [unit_vectors(reference_backend(each).last_hidden(texts), 256)[0] for each in (file, without, folder)]
    assert vectors[0] @ vectors[1] > 0.999 > vectors[0] @ vectors[2]


def test_other_models_of_gemma_are_refused() -> None:
    file = GgufCheckpoint(FILE)
    plain = {name: info for name, info in file._infos.items() if "norm_in" not in name}
    with pytest.raises(CheckpointError, match="of gemma3, only embedding models are supported"):
        hf_config(file.metadata, plain, None, False, "file")
