"""Embeddings: what texts are turned into for a model whose last hidden state says what a text means."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.config import ModelConfig
from bitnet_numba.engine.request import check_ids, is_list
from bitnet_numba.errors import BitNetError, ContextFull, RequestError, shown
from bitnet_numba.text.tokenizer import Tokenizer

END = "<|endoftext|>"  # the token whose state is the embedding of the text before it; if there is none, eos
BATCH_TOKENS = 2048  # between which other users of the model have their turn, and requests may end
GENERATES_NOTHING = "this is an embedding model, which generates nothing: use embed"
NO_EMBEDDINGS = "this is no embedding model: it generates text"


def embedding_ids(
    tokenizer: Tokenizer, config: ModelConfig, capacity: int, texts: Sequence[Any], prompt: str = ""
) -> list[list[int]]:
    """The token ids that embeddings are made of: those of `prompt` and each text, and its end; given ids stay as they
    are.

    Raises RequestError or ContextFull, naming the text's index, if one is no text or has more than `capacity` tokens.
    """
    if not config.embeds:
        raise RequestError(NO_EMBEDDINGS)
    if not is_list(texts):
        raise RequestError(f"embed takes a list of texts, or of lists of token ids, not {shown(texts)}")
    if not isinstance(prompt, str):
        raise RequestError(f"prompt must be a string, not {shown(prompt)}")
    end = tokenizer.encode(END, add_bos=False)
    if len(end) != 1:
        if tokenizer.eos_id is None:
            raise RequestError(f"the model's tokenizer has no token {END}, nor one that ends a text")
        end = [tokenizer.eos_id]
    all_ids = []
    for i, text in enumerate(texts):
        try:
            if isinstance(text, str):
                ids = tokenizer.encode(prompt + text, max_tokens=capacity) + end
            elif is_list(text):
                ids = check_ids(text, config.vocab_size)
            else:
                raise RequestError(f"it must be a text or a list of token ids, not {shown(text)}")
            if len(ids) > capacity:
                raise ContextFull(f"it has {len(ids)} tokens, but the context holds {capacity}")
        except BitNetError as error:
            raise type(error)(f"text {i}: {error}") from None
        all_ids.append(ids)
    return all_ids


def batches(all_ids: Sequence[Sequence[int]]) -> Iterator[slice]:
    """Which texts are computed together: neighbours of up to BATCH_TOKENS in all, or one."""
    start = tokens = 0
    for i, ids in enumerate(all_ids):
        if i > start and tokens + len(ids) > BATCH_TOKENS:
            yield slice(start, i)
            start, tokens = i, 0
        tokens += len(ids)
    if start < len(all_ids):
        yield slice(start, len(all_ids))


def unit_vectors(hidden: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    """The first `dimensions` of each row, scaled to length 1: float32 [n, hidden] -> [n, dimensions].

    Raises ValueError for NaN and infinity.
    """
    if not np.isfinite(hidden).all():
        raise ValueError("an embedding holds NaN or infinity")
    kept = hidden[:, :dimensions]
    lengths = np.sqrt(np.einsum("ij,ij->i", kept, kept, dtype=np.float64))
    return (kept / np.maximum(lengths, 1e-12)[:, None]).astype(np.float32)
