"""Attention in float32 multiply-adds, for rows of any slots.

Contract: the reference's attention of every used row over its own slot's tokens, in float32; unused rows are not
written; a row's bits depend on its own slot and position alone.

Tolerance: that of test_attention_prompt with nothing left out of q and p (their terms are whole here).
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.paged_simt import attention_rows_grid, attention_rows_spec
from bitnet_numba.kernels.runtime.spec import KernelSpec
from tests.kernels.attention.test_kv_cache import random_where
from tests.kernels.attention.test_prefill import Context
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated


def check_attention_rows(
    spec: KernelSpec, shape: tuple[int, int, int], rows: int, slots: int, tokens: int, seed: int, spread: float = 1.0
) -> None:
    """Rows of several slots against the reference, and one of them alone."""
    head_dim, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads = kv_heads * group
    context = Context(slots, tokens, kv_heads, head_dim, slots > 1, rng)
    where = random_where(rows, slots, tokens, rng)
    for slot in range(slots):
        context.fill(slot, int(where[where[:, 0] == slot, 1].max(initial=-1)) + 1)
    qkv = (rng.standard_normal((rows, heads + 2 * kv_heads, head_dim)) * spread).astype(np.float32)

    def attend(which: slice) -> np.ndarray:
        count = len(where[which])
        out = Out(count * heads * head_dim, np.float32)
        poison = out.array.copy().reshape(count, -1)
        angles, cache = (context.cos, context.sin), context.cache.arguments(context.cache.keys, context.cache.values)
        grid = attention_rows_grid(count, kv_heads, group)
        run(spec, grid, [qkv[which], *angles, where[which], *cache, out, kv_heads])
        result = out.array.reshape(count, -1).copy()
        unused = where[which, 0] < 0
        assert result[unused].tobytes() == poison[unused].tobytes(), "an unused row was written"
        return result

    result = attend(slice(0, rows))
    stored = {
        slot: context.read(slot, int(where[where[:, 0] == slot, 1].max()) + 1) for slot in set(where[:, 0]) - {-1}
    }
    for row in rng.permutation(rows)[:24]:
        slot, position = where[row]
        if slot >= 0:
            context.check_row(spec.name, qkv[row, :heads], slot, position, result[row], 0, *stored[slot])
    alone = int(rng.integers(rows))
    assert attend(slice(alone, alone + 1)).tobytes() == result[alone].tobytes(), f"row {alone} differs alone"


@simulated
@settings(max_examples=6)
@given(
    shape=st.sampled_from([(8, 4, 1), (4, 1, 2), (6, 6, 1), (34, 2, 1), (20, 3, 1)]),
    rows=st.integers(1, 3),
    slots=st.integers(1, 2),
    tokens=st.integers(3, 90),
    seed=st.integers(0, 2**32 - 1),
)
def test_simulated_rows(shape: tuple[int, int, int], rows: int, slots: int, tokens: int, seed: int) -> None:
    check_attention_rows(attention_rows_spec(arch(), *shape[:2], threads=32), shape, rows, slots, tokens, seed)


@needs_gpu
@settings(max_examples=30)
@given(
    shape=st.sampled_from(
        [(128, 4, 5), (64, 4, 2), (96, 1, 4), (100, 1, 3), (256, 3, 2), (128, 8, 2), (6, 5, 3), (250, 2, 1), (2, 1, 1)]
    ),
    rows=st.integers(1, 40),
    slots=st.integers(1, 4),
    tokens=st.integers(40, 400),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_rows_on_gpu(shape: tuple[int, int, int], rows: int, slots: int, tokens: int, seed: int, spread: float) -> None:
    check_attention_rows(attention_rows_spec(arch(), *shape[:2]), shape, rows, slots, tokens, seed, spread)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="even head sizes up to 256, not 3"):
        attention_rows_spec(61, 3, 1)
    with pytest.raises(ValueError, match="at least one query head, not 0"):
        attention_rows_spec(61, 8, 0)
