"""Attention in float32 multiply-adds, for tokens of any slots.

Contract: the reference's attention of every used token over its own slot's tokens, in float32; unused tokens
are not written; a token's bits depend on its own slot and position alone.

Tolerance: that of test_prefill with nothing left out of q and p (their terms are whole here).
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.kv_dtype import KVDtype
from bitnet_numba.kernels.attention.paged_simt import THREADS, paged_simt_grid, paged_simt_spec
from tests.kernels.attention.test_kv_cache import ALL_DTYPES, random_slot_positions
from tests.kernels.attention.test_prefill import Context
from tests.kernels.harness import Out, arch, needs_gpu, run, simulated


def check_paged_simt(
    shape: tuple[int, int, int],
    num_tokens: int,
    slots: int,
    tokens: int,
    seed: int,
    dtype: KVDtype,
    spread: float = 1.0,
    threads: int = THREADS,
) -> None:
    """Tokens of several slots against the reference, and one of them alone."""
    head_dim, group, kv_heads = shape
    rng, spec = np.random.default_rng(seed), paged_simt_spec(arch(), head_dim, group, dtype, threads)
    heads = kv_heads * group
    context = Context(slots, tokens, kv_heads, head_dim, slots > 1, rng, dtype)
    slot_positions = random_slot_positions(num_tokens, slots, tokens, rng)
    for slot in range(slots):
        context.fill(slot, int(slot_positions[slot_positions[:, 0] == slot, 1].max(initial=-1)) + 1)
    qkv = (rng.standard_normal((num_tokens, heads + 2 * kv_heads, head_dim)) * spread).astype(np.float32)

    def attend(which: slice) -> np.ndarray:
        count = len(slot_positions[which])
        out = Out(count * heads * head_dim, np.float32)
        poison = out.array.copy().reshape(count, -1)
        angles, cache = (context.cos, context.sin), context.cache.arguments(context.cache.keys, context.cache.values)
        grid = paged_simt_grid(count, kv_heads, group)
        run(spec, grid, [qkv[which], *angles, slot_positions[which], *cache, out, kv_heads])
        result = out.array.reshape(count, -1).copy()
        unused = slot_positions[which, 0] < 0
        assert result[unused].tobytes() == poison[unused].tobytes(), "an unused token was written"
        return result

    result = attend(slice(0, num_tokens))
    stored = {
        slot: context.read(slot, int(slot_positions[slot_positions[:, 0] == slot, 1].max()) + 1)
        for slot in set(slot_positions[:, 0]) - {-1}
    }
    for token in rng.permutation(num_tokens)[:24]:
        slot, position = slot_positions[token]
        if slot >= 0:
            context.check_token(spec.name, qkv[token, :heads], slot, position, result[token], 0, *stored[slot])
    alone = int(rng.integers(num_tokens))
    assert attend(slice(alone, alone + 1)).tobytes() == result[alone].tobytes(), f"token {alone} differs alone"


@simulated
@settings(max_examples=6)
@given(
    shape=st.sampled_from([(8, 4, 1), (4, 1, 2), (6, 6, 1), (34, 2, 1), (20, 3, 1)]),
    num_tokens=st.integers(1, 3),
    slots=st.integers(1, 2),
    tokens=st.integers(3, 90),
    seed=st.integers(0, 2**32 - 1),
    dtype=ALL_DTYPES,
)
def test_simulated_paged_simt(
    shape: tuple[int, int, int], num_tokens: int, slots: int, tokens: int, seed: int, dtype: KVDtype
) -> None:
    check_paged_simt(shape, num_tokens, slots, tokens, seed, dtype, threads=32)


@needs_gpu
@settings(max_examples=30)
@given(
    shape=st.sampled_from(
        [(128, 4, 5), (64, 4, 2), (96, 1, 4), (100, 1, 3), (256, 3, 2), (128, 8, 2), (6, 5, 3), (250, 2, 1), (2, 1, 1)]
    ),
    num_tokens=st.integers(1, 40),
    slots=st.integers(1, 4),
    tokens=st.integers(40, 400),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    dtype=ALL_DTYPES,
)
def test_paged_simt_on_gpu(
    shape: tuple[int, int, int], num_tokens: int, slots: int, tokens: int, seed: int, spread: float, dtype: KVDtype
) -> None:
    check_paged_simt(shape, num_tokens, slots, tokens, seed, dtype, spread)


def test_refuses() -> None:
    with pytest.raises(ValueError, match="even head sizes up to 256, not 3"):
        paged_simt_spec(61, 3, 1)
    with pytest.raises(ValueError, match="at least one query head, not 0"):
        paged_simt_spec(61, 8, 0)
