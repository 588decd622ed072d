"""Hypothesis strategies that several test files use, or that stand for a kind of input: token ids, sampling parameters,
logits, JSON values and damaged bytes."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from bitnet_numba.sampling_params import SamplingParams

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
    presence_penalty=st.sampled_from([0.0, 0.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.4]),
    logit_bias=st.sampled_from([(), (), ((3, 1.5), (40, -100.0))]),
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


@st.composite
def edited(draw: st.DrawFn, params: SamplingParams, vocab: int) -> tuple[SamplingParams, list[int], int]:
    """Parameters with bias, penalties and tokens that may not come yet, a history, and how much of it is the prompt."""
    ids = st.integers(0, vocab - 1)
    history = draw(st.lists(ids, min_size=1, max_size=30))
    penalties = st.sampled_from([0.0, 0.0, 0.3, -1.5, 2.0])
    params = replace(
        params,
        logit_bias=draw(st.dictionaries(ids, st.floats(-100, 100, width=32), max_size=5)),
        presence_penalty=draw(penalties),
        frequency_penalty=draw(penalties),
        stop_token_ids=draw(st.lists(ids, max_size=vocab // 2)),
        min_tokens=draw(st.sampled_from([0, 5, 1000])),
        max_new_tokens=None,
    )
    return params, history, draw(st.integers(1, len(history)))
