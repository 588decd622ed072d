"""Hypothesis strategies that several test files use, or that stand for a kind of input: token ids, sampling parameters,
logits, JSON values and damaged bytes."""

import numpy as np
from hypothesis import strategies as st

from bitnet_numba.sampling import SamplingParams

seeds = st.integers(0, 2**64 - 1)
# Token ids of the recorded tokenizer without its special tokens, so that none ends an answer.
some_ids = st.lists(st.integers(0, 1989), min_size=1, max_size=30)
sampling = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.5]),
    top_p=st.sampled_from([1.0, 0.9]),
    top_k=st.sampled_from([0, 40]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=seeds,
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def byte_edits(max_size: int) -> st.SearchStrategy[list[tuple[float, bytes]]]:
    """Changes for `conftest.mutate`: places as shares of the data, and the bytes to write there."""
    return st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), max_size=max_size)


@st.composite
def logit_vectors(draw: st.DrawFn, most: int = 200) -> np.ndarray:
    """Random logits, float32; sometimes with ties."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    z = rng.normal(0, draw(st.sampled_from([0.1, 1.0, 5.0, 30.0])), draw(st.integers(1, most)))
    return (np.round(z) if draw(st.booleans()) else z).astype(np.float32)
