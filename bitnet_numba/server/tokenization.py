"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from bitnet_numba.engine.request import check_ids
from bitnet_numba.errors import RequestError
from bitnet_numba.server.chat_completions import as_messages
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.schemas import DetokenizeBody, TokenizeBody
from bitnet_numba.server.service import Service


async def tokenize(service: Service, exchange: Exchange, body: TokenizeBody) -> None:
    """The token ids of a prompt or a conversation."""
    engine = service.engine
    service.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give either prompt or messages", param="prompt", code="invalid_value")

    def encode() -> list[int]:
        if body.prompt is not None:
            return engine.tokenizer.encode(body.prompt, body.add_special_tokens is not False, engine.context)
        if not body.messages:
            raise RequestError("messages: the conversation is empty")
        messages = as_messages(body.messages, engine.tokenizer)
        return engine.tokenizer.encode_chat(messages, body.add_generation_prompt is not False, engine.context)

    ids = await service.in_encoder(encode, "messages" if body.prompt is None else "prompt")
    content: dict[str, Any] = {"count": len(ids), "max_model_len": engine.context, "tokens": ids}
    if body.return_token_strs:
        content["token_strs"] = [engine.tokenizer.decode([i], skip_special=False) for i in ids]
    await exchange.json(content)


async def detokenize(service: Service, exchange: Exchange, body: DetokenizeBody) -> None:
    """The text of token ids."""
    engine = service.engine
    service.check_model(body.model)

    def decode() -> str:
        ids = check_ids(body.tokens, engine.config.vocab_size) if body.tokens else []
        return engine.tokenizer.decode(ids)

    text = await service.in_encoder(decode, "tokens")
    await exchange.json({"prompt": text})
