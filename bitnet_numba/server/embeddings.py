"""POST /v1/embeddings: what texts mean, as vectors."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitnet_numba.engine.embedding import NO_EMBEDDINGS, batches, embedding_ids
from bitnet_numba.engine.engine import Engine
from bitnet_numba.server.completions import list_prompts
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.schemas import EmbeddingBody
from bitnet_numba.server.service import Service


async def embeddings(service: Service, exchange: Exchange, body: EmbeddingBody) -> None:
    """The vectors of one text or several."""
    engine = service.engine
    model = service.check_model(body.model)
    size = engine.config.hidden_size
    if not engine.config.embeds:
        raise ApiError(400, NO_EMBEDDINGS, param="model", code="invalid_value")
    if body.dimensions is not None and not 1 <= body.dimensions <= size:
        raise ApiError(400, f"dimensions must be between 1 and {size}", param="dimensions", code="invalid_value")
    texts = list_prompts(body.input)
    as_base64 = body.encoding_format == "base64"
    async with service.embedding(exchange) as why_ended:
        work = lambda: compute(engine, texts, body.dimensions, as_base64, why_ended)  # noqa: E731
        data, tokens = await service.in_encoder(work, "input")
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    exchange.note_usage(usage)
    await exchange.json({"object": "list", "data": data, "model": model, "usage": usage})


def compute(
    engine: Engine,
    texts: list[str | list[int]],
    dimensions: int | None,
    as_base64: bool,
    why_ended: Callable[[], ApiError | None],
) -> tuple[list[dict[str, Any]], int]:
    """The vectors in a response's form, and the number of tokens. Raises what `why_ended` gives between batches."""
    all_ids = embedding_ids(engine.tokenizer, engine.config, engine.context, texts)
    data: list[dict[str, Any]] = []
    for together in batches(all_ids):
        if (error := why_ended()) is not None:
            raise error
        for vector in engine.embed(all_ids[together], dimensions):
            data.append({"object": "embedding", "index": len(data), "embedding": encoded(vector, as_base64)})
    return data, sum(map(len, all_ids))


def encoded(vector: NDArray[np.float32], as_base64: bool) -> str | list[float]:
    """A vector as JSON has it: numbers, or base64 of its float32 values, little endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
