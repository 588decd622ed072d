"""modules_to_not_convert: matched as transformers matches it, and never for long."""

import time
from typing import Any

import pytest

from bitnet_numba.errors import ConfigError
from bitnet_numba.module_patterns import check_patterns, names_module


@pytest.mark.parametrize(
    ("patterns", "named", "others"),
    [
        (["model.layers.1", "down_proj"], "model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"),
        (["down_proj"], "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"),
        (["model.layers.*.mlp"], "model.layers.7.mlp.up_proj", "model.layers.7.self_attn.o_proj"),
        ([r"x|model\.layers\.[01]\..*"], "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"),
        (["1.mlp.up_proj"], "model.layers.11.mlp.up_proj", "model.layers.1.mlp.gate_proj"),
        (["model.layers.0.mlp.up"], "model.layers.0.mlp.up", "model.layers.0.mlp.up_proj"),
        (["model.layers.0."], "model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj"),
        ([r"model\.layers\.(?:0|3)\.mlp"], "model.layers.3.mlp.down_proj", "model.layers.1.mlp.down_proj"),
        (["lm_head"], "lm_head", "model.lm_head.norm"),
        ([""], "lm_head", None),
        ([], None, "lm_head"),
    ],
)
def test_names(patterns: list[str], named: str | None, others: str | None) -> None:
    checked = check_patterns(patterns, "x")
    assert named is None or names_module(checked, named)
    assert others is None or not names_module(checked, others)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("lm_head", "must be a list of names"),
        ([1], "must be a list of names"),
        ({"a": 1}, "must be a list of names"),
        (["("], r"'\(' is not a module name or pattern"),
        (["a{99999999999999999999}"], "is not a module name or pattern"),
        (["(([a-z_.0-9])+)+!"], "too complex"),
        (["(a|a)*!", "lm_head"], "too complex"),
        (["(?:.*){9}!"], "too complex"),
        (["(.+)(?#)+!"], "too complex"),  # a comment between the group and its repetition
        (["(?x: (.+) + )!"], "too complex"),  # blanks without meaning
        ([".*.*.*.*.*!"], "too complex"),
        (["(.|.|.)" * 20 + "!"], "too complex"),
        ([".*.*.*!"] * 30, "too complex"),
        (["x" * 201], "too complex"),
        (["lm_head"] * 5000, "5000 entries"),
    ],
)
def test_what_is_wrong_or_slow_is_refused(patterns: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_patterns(patterns, "modules_to_not_convert")
    assert len(str(caught.value)) < 150 and "\n" not in str(caught.value)


def test_the_slowest_patterns_that_pass_are_fast() -> None:
    patterns = check_patterns(["[a-z.]*[a-z.]*[a-z.]*!", "(.|.)" * 19 + "!"], "x")
    start = time.process_time()
    assert not names_module(patterns, "model.layers.x.self_attn.q_proj")
    assert time.process_time() - start < 2
