"""What the CUDA backend cannot run is said before anything is compiled or uploaded."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bitnet_numba.backends.cuda.weights import why_unsupported
from bitnet_numba.checkpoint.packed import PackedCheckpoint, packed_plan
from bitnet_numba.config import ModelConfig
from tools.make_checkpoint import PRESETS, QUANTIZATION


def reason(name: str, quantization: dict[str, Any] | None = None, **changes: Any) -> str | None:
    """Why the model of a preset, with other keys in its config.json, cannot run."""
    raw = PRESETS[name][1] | changes
    if PRESETS[name][0] != "floats":
        own_norms = {"use_rms_norm": True} if name.startswith("embedding") else {}
        raw |= {"quantization_config": QUANTIZATION["online"] | own_norms | (quantization or {})}
    config = ModelConfig.from_hf(raw)
    return why_unsupported(
        cast(PackedCheckpoint, SimpleNamespace(config=config, names=list(packed_plan(config, "bf16", "bf16"))))
    )


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_run(name: str) -> None:
    assert reason(name) is None


def test_models_with_group_scales() -> None:
    for name in ("bonsai-1.7b", "bonsai-4b", "bonsai-8b"):
        assert reason(name) is None
    assert "1 heads of 34 are no multiple of 4 columns" in str(
        reason("bonsai-8b", num_attention_heads=1, num_key_value_heads=1, head_dim=34)
    )
    assert "14352 columns is over 14336 with group scales" in str(reason("bonsai-8b", intermediate_size=14352))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"use_rms_norm": True}}, "use_rms_norm"),
        ({"quantization": {"modules_to_not_convert": ["lm_head", "down_proj"]}}, "modules_to_not_convert"),
        ({"hidden_size": 2570, "head_dim": 128}, "hidden_size 2570 is not a multiple of 32"),
        ({"intermediate_size": 6920}, "intermediate_size 6920 is not a multiple of 16"),
        ({"intermediate_size": 28 * 1024 + 16}, "a linear of 28688 columns is over 28672"),
        ({"num_attention_heads": 115, "head_dim": 250}, "a linear of 28750 columns is over 28672"),
        ({"head_dim": 258}, "head_dim 258 is over 256"),
        ({"vocab_size": (1 << 18) + 1}, "a vocabulary of 262145 is over 262144"),
    ],
)
def test_reasons(changes: dict[str, Any], message: str) -> None:
    assert message in str(reason("2b-4t", **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": {"use_rms_norm": False}}, "linears of embedding models without a norm of their own"),
        ({"head_dim": 20, "num_attention_heads": 4, "num_key_value_heads": 2}, "4 and 2 heads of 20 are not whole"),
        ({"head_dim": 30, "num_attention_heads": 8, "num_key_value_heads": 8}, "8 and 8 heads of 30 are not whole"),
        ({"head_dim": 258}, "16 and 8 heads of 258 are not whole blocks of rows"),
        ({"head_dim": 260}, "head_dim 260 is over 256"),
        ({"intermediate_size": 3080}, "intermediate_size 3080 is not a multiple of 16"),
    ],
)
def test_reasons_of_embedding_models(changes: dict[str, Any], message: str) -> None:
    assert message in str(reason("embedding-0.6b", **changes))
    assert reason("embedding-0.6b", vocab_size=(1 << 18) + 1) is None  # which is the samplers' limit
