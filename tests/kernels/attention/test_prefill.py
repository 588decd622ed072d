"""The tensor-core attention of a prompt's tokens; test_prefill_wgmma.py checks its other kernel in the same way.

Contract: the reference's causal attention of every used token over the cache, in float32, whatever the pages; unused
tokens are not written; a token's bits depend on its own position alone.

Tolerance, with e = 2^-24. q and p are two terms, which leave out up to 2^-17 of an entry, 128 e, if they are bfloat16;
of float16 4 e of an entry, or e / 2 where that is more (a query's is then e / 2 sum|k_i| of a score). Tensor cores
cut off where float32 arithmetic rounds: 2 e for each of a sum's terms. So a score, a sum of 2 D products, is off by
at most (128 + 4 D + 8) e * sum|q_i k_i| (the scaling and rotation are the 8); 2^x is within 2 ulp and its argument, at
most ~2^7 apart, rounds by 2^7 e: every weight is off by a factor 1 + r, r <= 2 (136 + 4 D) e max_t(sum|q_i k_i|) +
2^8 e. The two terms of p leave 128 e, sums of T weights and of 2 T weighted values add 4 T e each, rescaling once a
tile of 16 or more 2 e each, and the division by the sum doubles r: (2 r + (128 + 9 T) e) max|v|.
"""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.attention.prefill import block_shape, prefill_grid, prefill_spec
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.reference.model import rotate
from tests.kernels.attention.test_kv_cache import DTYPES, NAN_BITS, Cache
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated

EPSILON = 2.0**-24
TERMS = {"bfloat16": 128, "float16": 4}  # what two terms leave out, in units of that


class Context:
    """A random cache of some slots, all of whose tokens are there up to `tokens`; what is not is NaN in every bit."""

    def __init__(
        self,
        slots: int,
        tokens: int,
        kv_heads: int,
        head_dim: int,
        pooled: bool,
        rng: np.random.Generator,
        dtype: KVDtype = DEFAULT,
    ):
        self.kv_heads, self.head_dim, self.tokens = kv_heads, head_dim, tokens
        self.cache = Cache(slots, tokens, kv_heads, head_dim, pooled, rng, dtype)
        self.cache.keys[:], self.cache.values[:] = NAN_BITS * 0x10001, NAN_BITS * 0x10001
        self.k, self.v = rng.standard_normal((2, slots, tokens, kv_heads, head_dim)).astype(np.float32)
        angles = rng.uniform(-np.pi, np.pi, (tokens, head_dim // 2)).astype(np.float32)
        self.cos, self.sin = np.cos(angles), np.sin(angles)

    def fill(self, slot: int, end: int) -> None:
        """Stores a slot's tokens 0 .. end - 1."""
        for token in range(end):
            self.cache.store(slot, token, self.k[slot, token], self.v[slot, token])

    def read(self, slot: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """A slot's keys and values as the cache has them: float64 [end, kv_heads, head_dim] each."""
        return self.cache.read(slot, end)

    def check_token(
        self,
        what: str,
        q: np.ndarray,
        slot: int,
        position: int,
        actual: np.ndarray,
        terms: int,
        k: np.ndarray,
        v: np.ndarray,
    ) -> None:
        """A token's q [heads, D] (not rotated) and result [heads, D], against float64 attention over k, v [T, G, D].
        `terms`: the kernel's error of an entry of q or p, in units of 2^-24."""
        T, D, group = position + 1, self.head_dim, len(q) // self.kv_heads
        k, v = k[:T], v[:T]
        cos, sin = (np.concatenate([table[position]] * 2)[None] for table in (self.cos, self.sin))
        rotated = rotate(q[None], cos, sin)[0].astype(np.float64).reshape(self.kv_heads, group, D)
        scores = np.einsum("ghd,tgd->ght", rotated, k) * D**-0.5
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
        p /= p.sum(axis=-1, keepdims=True)
        expected = np.einsum("ght,tgd->ghd", p, v)
        largest = np.einsum("ghd,tgd->ght", np.abs(rotated), np.abs(k)).max() * D**-0.5
        r = 2 * (terms + 8 + 4 * D) * EPSILON * largest + 2**8 * EPSILON
        if terms and self.cache.dtype == "float16":
            r += EPSILON * np.abs(k).sum(axis=-1).max()
        bound = (2 * r + (terms + 9 * T) * EPSILON) * np.abs(v).max()
        assert_close(actual.reshape(expected.shape), expected, bound, f"{what}, position {position}")


def run_prefill(
    spec: KernelSpec, warps: int, context: Context, group: int, inputs: list, out: Out, num_tokens: int
) -> None:
    """Runs prefill.py's kernel. inputs: qkv, cos, sin, slot_positions."""
    grid = prefill_grid(num_tokens, context.kv_heads, context.head_dim, group, warps)
    cache = context.cache.arguments(context.cache.keys, context.cache.values)
    run(spec, grid, [*inputs, *cache, out, num_tokens, context.kv_heads])


def check_prefill(
    spec: KernelSpec,
    warps: int,
    shape: tuple[int, int, int],
    start: int,
    used: int,
    num_tokens: int,
    pooled: bool,
    seed: int,
    spread: float = 1.0,
    run_kernel: Callable[..., None] = run_prefill,
    dtype: KVDtype = DEFAULT,
) -> None:
    """One pass of `used` of `num_tokens` tokens against the reference, and its last tokens as a pass of their own."""
    head_dim, group, kv_heads = shape
    rng = np.random.default_rng(seed)
    heads, tokens = kv_heads * group, start + used
    slots = 3 if pooled else 1
    slot = int(rng.integers(slots))
    context = Context(slots, tokens, kv_heads, head_dim, pooled, rng, dtype)
    context.fill(slot, tokens)
    qkv = (rng.standard_normal((num_tokens, heads + 2 * kv_heads, head_dim)) * spread).astype(np.float32)
    qkv[used:] = np.nan

    def attend(first: int, num_tokens: int) -> np.ndarray:
        slot_positions = np.full((num_tokens, 2), (-1, 2**30), np.int32)
        slot_positions[: used - first, 0], slot_positions[: used - first, 1] = slot, start + np.arange(first, used)
        out = Out(num_tokens * heads * head_dim, np.float32)
        poison = out.array.copy().reshape(num_tokens, -1)
        inputs = [qkv[first:], context.cos, context.sin, slot_positions]
        run_kernel(spec, warps, context, group, inputs, out, num_tokens)
        result = out.array.reshape(num_tokens, -1)
        unused = slice(used - first, num_tokens)
        assert result[unused].tobytes() == poison[unused].tobytes(), "an unused token was written"
        return result[: used - first].copy()

    result = attend(0, num_tokens)
    k, v = context.read(slot, tokens)
    for token in rng.permutation(used)[:24]:
        context.check_token(spec.name, qkv[token, :heads], slot, start + token, result[token], TERMS[dtype], k, v)
    cut = int(rng.integers(used))
    assert attend(cut, num_tokens - cut).tobytes() == result[cut:].tobytes(), (
        f"tokens from {cut} on differ as a pass of their own"
    )


@simulated
@settings(max_examples=3)
@example(shape=(16, 2, 1), start=60, used=10, num_tokens=18, pooled=True, seed=1, dtype="float16")
@example(shape=(32, 2, 1), start=3, used=5, num_tokens=5, pooled=False, seed=1, dtype="bfloat16")
@example(
    shape=(18, 1, 2), start=60, used=4, num_tokens=4, pooled=False, seed=1, dtype="float16"
)  # up to the cache's last word, padded num_tokens
@given(
    shape=st.sampled_from([(6, 2, 1), (18, 1, 2), (32, 2, 1)]),
    start=st.integers(0, 70),
    used=st.integers(1, 17),
    num_tokens=st.integers(17, 18),
    pooled=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    dtype=DTYPES,
)
def test_simulated_prefill(
    shape: tuple[int, int, int], start: int, used: int, num_tokens: int, pooled: bool, seed: int, dtype: KVDtype
) -> None:
    spec = prefill_spec(arch(), shape[0], shape[1], dtype, warps=2)
    check_prefill(spec, 2, shape, start, used, num_tokens, pooled, seed, dtype=dtype)


@simulated
def test_simulated_large_heads() -> None:
    """Two blocks a head, tiles of a quarter of a page, lower terms of q in shared memory."""
    check_prefill(prefill_spec(arch(), 160, 1, warps=1), 1, (160, 1, 1), 30, 5, 5, True, 3)


@needs_gpu
@settings(max_examples=40)
@example(shape=(128, 4, 5), start=0, used=512, num_tokens=512, pooled=False, seed=1, spread=1.0, dtype="float16")
@example(shape=(128, 4, 1), start=3000, used=100, num_tokens=128, pooled=True, seed=2, spread=8.0, dtype="bfloat16")
@example(shape=(256, 3, 2), start=700, used=130, num_tokens=256, pooled=True, seed=3, spread=1.0, dtype="float16")
@given(
    shape=st.sampled_from(
        [
            (128, 4, 2),
            (64, 4, 2),
            (96, 1, 4),
            (100, 1, 3),
            (256, 3, 1),
            (128, 8, 1),
            (6, 5, 1),
            (160, 6, 1),
            (32, 7, 2),
            (250, 2, 1),
        ]
    ),
    start=st.integers(0, 600),
    used=st.integers(1, 200),
    num_tokens=st.sampled_from([200, 256]),
    pooled=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    dtype=DTYPES,
)
def test_prefill_on_gpu(
    shape: tuple[int, int, int],
    start: int,
    used: int,
    num_tokens: int,
    pooled: bool,
    seed: int,
    spread: float,
    dtype: KVDtype,
) -> None:
    spec = prefill_spec(arch(), shape[0], shape[1], dtype)
    check_prefill(spec, 4, shape, start, used, num_tokens, pooled, seed, spread, dtype=dtype)


def test_block_shapes() -> None:
    assert [block_shape(group) for group in (1, 2, 3, 4, 5, 6, 8)] == [
        (1, 4), (2, 2), (3, 1), (4, 1), (1, 4), (3, 1), (4, 1)
    ]  # fmt: skip


def test_refuses() -> None:
    with pytest.raises(ValueError, match="compute capability 8.0, not 7.5"):
        prefill_spec(75, 128, 4)
    with pytest.raises(ValueError, match="even head sizes up to 256, not 258"):
        prefill_spec(90, 258, 4)
