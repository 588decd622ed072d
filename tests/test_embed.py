"""The embedding look-up is exact: bfloat16 rows are widened, int8 rows take one float32 product."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_numba.bfloat16 import to_float32
from bitnet_numba.kernels.embed import embed_form, embed_grid
from bitnet_numba.kernels.forms import KernelForm
from tests.kernel_harness import Out, arch, needs_gpu, run, run_simulated


def check_embed(form: KernelForm, threads: int, int8: bool, vocab: int, columns: int, seed: int) -> None:
    """One look-up among random rows; the token's bit is added to those that were set."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 1 << 16, (vocab, columns)).astype(np.uint16)
    bits[np.isnan(to_float32(bits))] = 0
    rows = rng.integers(-128, 128, (vocab, columns)).astype(np.int8) if int8 else bits
    scale = rng.uniform(0.001, 3.0, vocab).astype(np.float32)
    tokens = rng.integers(0, vocab, 9).astype(np.int32)
    pos = int(rng.integers(9))
    token = int(tokens[pos])
    before = rng.integers(-(2**31), 2**31, -(-vocab // 32)).astype(np.int32)
    seen, h = Out(len(before), np.int32, before), Out(columns, np.float32)
    position = np.array([pos], np.int32)
    run(form, embed_grid(columns, threads), [rows, scale, tokens, position, seen, h, columns])
    expected = rows[token].astype(np.float32) * scale[token] if int8 else to_float32(rows[token])
    assert h.array.tobytes() == expected.tobytes()
    after = before.view(np.uint32).copy()
    after[token // 32] |= np.uint32(1 << token % 32)
    assert np.array_equal(seen.array.view(np.uint32), after)


@settings(max_examples=10)
@given(int8=st.booleans(), vocab=st.integers(1, 100), columns=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def simulate_embed(int8: bool, vocab: int, columns: int, seed: int) -> None:
    check_embed(embed_form(arch(), int8, 32), 32, int8, vocab, columns, seed)


def test_simulated() -> None:
    run_simulated(__file__)


@needs_gpu
@given(int8=st.booleans(), vocab=st.integers(1, 5000), columns=st.integers(1, 3000), seed=st.integers(0, 2**32 - 1))
def test_embed_on_gpu(int8: bool, vocab: int, columns: int, seed: int) -> None:
    check_embed(embed_form(arch(), int8), 256, int8, vocab, columns, seed)
