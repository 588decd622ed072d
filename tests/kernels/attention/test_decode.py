"""Attention of one token: rotary embedding, cache append and grouped-query attention.

Contract: keys and values are stored in the cache's type, bit for bit what the reference stores, rounded; the output is
the reference's attention over that cache, in float32.

Tolerance. The three bfloat16 terms of q and p hold all 24 bits. Tensor cores cut off, where float32 arithmetic rounds:
2 e for each of a sum's terms, with e = 2^-24. A score is a sum of D products of relative error 2 e, any order, so it is
off by at most 2 D * e * sum|q_i k_i| (scaled), plus the scaling's 6 e; 2^x is within 2 ulp and its argument, at most
~2^7 apart, rounds by 2^7 e; so every weight is off by a factor 1 + r, r <= 2 (D + 3) * e * max_t(sum|q_i k_i|) + 2^8 e.
Sums of T weights and of T weighted values add 2 T e each, and the division by the sum doubles r: (2 r + 4 T e) max|v|.
Two float16 terms leave out 4 e of an entry, or e / 2 where that is more: r takes 2 (4 sum|q_i k_i| + sum|k_i|) e on,
the output (4 + T) e max|v|.
"""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitnet_numba.kernels.attention.decode import DecodeScratch, decode_attention, decode_grid, decode_spec
from bitnet_numba.kernels.attention.kv_dtype import DEFAULT, KVDtype
from bitnet_numba.kernels.attention.parts import HeadShape, RopeTables, padded_head_dim, partial_dims
from bitnet_numba.kernels.runtime.device import DryRunDevice
from bitnet_numba.kernels.runtime.spec import KernelSpec
from bitnet_numba.reference.model import attend, rotate
from tests.kernels.attention.test_kv_cache import DTYPES, NAN_BITS, from_bits, to_bits
from tests.kernels.harness import Out, arch, assert_close, needs_gpu, run, simulated

EPSILON = 2.0**-24


def tolerance(q: np.ndarray, k: np.ndarray, v: np.ndarray, dtype: KVDtype) -> float:
    """See above, for rotated queries [H, D] and a cache [T, G, D]."""
    (heads, D), (T, kv_heads, _) = q.shape, k.shape
    largest = np.einsum("ghd,tgd->tgh", np.abs(q).reshape(kv_heads, heads // kv_heads, D), np.abs(k)).max() * D**-0.5
    r, more = 2 * (D + 3) * EPSILON * largest + 2**8 * EPSILON, 0.0
    if dtype != "bfloat16":
        r += 2 * EPSILON * (4 * largest + np.abs(k).sum(axis=-1).max())
        more = (4 + T) * EPSILON
    return float((2 * r + 4 * T * EPSILON + more) * np.abs(v).max())


def check_decode(
    spec: KernelSpec,
    grid: tuple[int, int],
    kv_heads: int,
    group: int,
    D: int,
    position: int,
    capacity: int,
    min_split: int,
    seed: int,
    spread: float = 1.0,
    dtype: KVDtype = DEFAULT,
) -> None:
    """Compares one launch with the reference."""
    rng = np.random.default_rng(seed)
    heads, DP = kv_heads * group, padded_head_dim(D)
    qkv = (rng.standard_normal((heads + 2 * kv_heads, D)) * spread).astype(np.float32)
    angles = rng.uniform(-np.pi, np.pi, (capacity, D // 2)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)
    # Tokens from `position` on were never written: as bits that read NaN, to show if they are read.
    caches = np.full((2, kv_heads, capacity, DP), NAN_BITS, np.uint16)
    caches[:, :, :position, :D] = to_bits(rng.standard_normal((2, kv_heads, position, D)).astype(np.float32), dtype)
    caches[:, :, :position, D:] = 0
    keys, values = (Out(cache.size // 2, np.int32, cache.view(np.int32)) for cache in caches)
    partials, stats, arrivals = grid[0] * heads * partial_dims(D), grid[0] * heads * 2, grid[1]
    scratch = (Out(partials, np.float32), Out(stats, np.float32), Out(arrivals, np.int32, np.zeros(arrivals, np.int32)))
    out = Out(heads * D, np.float32)
    positions = np.array([position], np.int32)
    run(spec, grid, [qkv, cos, sin, positions, keys, values, *scratch, out, kv_heads, capacity, min_split])

    row = slice(position, position + 1)
    cos2, sin2 = (np.concatenate([table[row]] * 2, axis=-1) for table in (cos, sin))  # [1, D]
    q = rotate(qkv[None, :heads], cos2, sin2)
    new_key = rotate(qkv[None, heads : heads + kv_heads], cos2, sin2)[0]
    caches[0, :, position, :D] = to_bits(new_key, dtype)
    caches[1, :, position, :D] = to_bits(qkv[heads + kv_heads :], dtype)
    caches[:, :, position, D:] = 0
    for name, array, expected in zip(("keys", "values"), (keys, values), caches, strict=True):
        assert np.array_equal(array.array.view(np.uint16), expected.reshape(-1)), f"{name} differ"
    assert not scratch[2].array.any(), "the arrival counters are not zero again"
    k, v = (from_bits(cache[:, : position + 1, :D].copy(), dtype).transpose(1, 0, 2) for cache in caches)  # [T, G, D]
    expected = attend(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))[0]  # [H, D]
    bound = tolerance(q[0], k, v, dtype)
    assert_close(out.array.reshape(heads, D), expected, bound, spec.name)


@simulated
@settings(max_examples=10)
@example(shape=(128, 4), long=True, threads=128, position=3, splits=2, seed=1, dtype="float16")
@example(shape=(6, 6), long=True, threads=64, position=33, splits=3, seed=1, dtype="bfloat16")
@given(
    shape=st.sampled_from([(8, 4), (4, 1), (2, 2), (20, 3), (64, 2), (34, 1), (32, 8), (16, 9)]),
    long=st.booleans(),
    threads=st.sampled_from([32, 64]),
    position=st.integers(0, 70),
    splits=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
    dtype=DTYPES,
)
def test_simulated_decode(
    shape: tuple[int, int], long: bool, threads: int, position: int, splits: int, seed: int, dtype: KVDtype
) -> None:
    D, group = shape
    threads = max(threads, 64) if long else threads  # a thread for each 16 bytes of a partial result
    spec = decode_spec(arch(), D, group, long, dtype, threads, unroll=2)
    _, head_blocks = decode_grid(1, HeadShape(group, 1, D), long)
    check_decode(spec, (splits, head_blocks), 1, group, D, position, 71, 16, seed, dtype=dtype)


@needs_gpu
@pytest.mark.long
@settings(max_examples=50)
@example(kind=((128, 4, 5), "float16"), long=True, position=4095, capacity=4096, min_split=64, seed=2, spread=4.0)
@example(kind=((128, 4, 5), "float16"), long=False, position=127, capacity=4096, min_split=256, seed=2, spread=1.0)
@example(kind=((128, 4, 5), "bfloat16"), long=True, position=32767, capacity=32768, min_split=64, seed=4, spread=1.0)
@example(kind=((256, 3, 4), "bfloat16"), long=True, position=32767, capacity=32768, min_split=64, seed=3, spread=1.0)
@given(
    kind=st.sampled_from(  # each is compiled, for short and for long contexts
        [((128, 4, 5), "float16"), ((128, 4, 5), "bfloat16"), ((64, 4, 2), "bfloat16"), ((96, 1, 16), "float16"),
         ((100, 1, 32), "bfloat16"), ((256, 3, 4), "bfloat16"), ((128, 8, 2), "float16"), ((6, 5, 3), "float16"),
         ((128, 16, 1), "bfloat16")]
    ),
    long=st.booleans(),
    position=st.integers(0, 1500),
    capacity=st.sampled_from([1501, 2048]),
    min_split=st.sampled_from([1, 16, 64, 256]),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
)  # fmt: skip
def test_decode_on_gpu(
    kind: tuple[tuple[int, int, int], KVDtype],
    long: bool,
    position: int,
    capacity: int,
    min_split: int,
    seed: int,
    spread: float,
) -> None:
    from bitnet_numba.kernels.runtime.device import usable_device

    (D, group, kv_heads), dtype = kind
    spec = decode_spec(arch(), D, group, long, dtype)
    grid = decode_grid(usable_device().num_sms, HeadShape(group * kv_heads, kv_heads, D), long)
    check_decode(spec, grid, kv_heads, group, D, position, capacity, min_split, seed, spread, dtype)


@pytest.mark.parametrize("head_dim", [0, 3, 127, 258])
def test_refuses_head_sizes(head_dim: int) -> None:
    with pytest.raises(ValueError, match=f"even head sizes up to 256, not {head_dim}"):
        decode_spec(90, head_dim, 1)


def test_launch_checks_its_operands() -> None:
    device, shape, capacity = DryRunDevice(90, 132), HeadShape(20, 5, 128), 128
    rope = RopeTables(*(device.empty(capacity * 64, np.float32) for _ in range(2)))
    qkv, out, position = (device.empty(n, t) for n, t in ((3840, np.float32), (2560, np.float32), (1, np.int32)))
    keys, values = (device.empty(5 * capacity * 64, np.int32) for _ in range(2))
    scratch = DecodeScratch.allocate(device, shape)
    assert scratch.nbytes == sum(array.nbytes for array in scratch.arrays)
    for long in (False, True):
        launch = decode_attention(
            device, qkv, rope, position, keys, values, capacity, scratch, out, shape, long=long, use_pdl=False
        )
        assert launch.spec is decode_spec(90, 128, 4, long, DEFAULT)
    with pytest.raises(ValueError, match="decode_attention: cos holds 8192 elements, .* 129 tokens takes 8256"):
        decode_attention(device, qkv, rope, position, keys, values, 129, scratch, out, shape)
    with pytest.raises(ValueError, match="a capacity of 0 tokens"):
        decode_attention(device, qkv, rope, position, keys, values, 0, scratch, out, shape)
    with pytest.raises(ValueError, match="out must be float32, not int32"):
        decode_attention(device, qkv, rope, position, keys, values, capacity, scratch, position, shape)
    with pytest.raises(ValueError, match="20 heads cannot share 6 key-value heads evenly"):
        decode_attention(device, qkv, rope, position, keys, values, capacity, scratch, out, HeadShape(20, 6, 128))
