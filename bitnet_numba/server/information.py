"""GET endpoints that tell of the server: health, metrics, models, and the description of its interface."""

from typing import Any

from bitnet_numba import __version__
from bitnet_numba.server.errors import ApiError
from bitnet_numba.server.exchange import Exchange
from bitnet_numba.server.metrics import CONTENT_TYPE
from bitnet_numba.server.openapi import document
from bitnet_numba.server.sampling_fields import OPENAI_DEFAULT
from bitnet_numba.server.service import Service


async def health(service: Service, exchange: Exchange) -> None:
    """200 if answers are generated, otherwise 503: see `Service.status`."""
    status = service.status
    content = {"status": status, "running": service.running, "waiting": max(service.open - service.running, 0)}
    await exchange.json(content, 200 if status == "ok" else 503)


async def metrics(service: Service, exchange: Exchange) -> None:
    """For Prometheus."""
    await exchange.respond(service.metrics.text(), CONTENT_TYPE)


async def models(service: Service, exchange: Exchange) -> None:
    """The model, by each of its names."""
    data = [_model(service, name) for name in service.settings.models]
    await exchange.json({"object": "list", "data": data})


async def model(service: Service, exchange: Exchange) -> None:
    """One model. Raises ApiError if it is not served here."""
    name = exchange.scope["path_params"]["model"]
    if name not in service.settings.models:
        raise ApiError(404, f"there is no model {name!r} here", param="model", code="model_not_found")
    await exchange.json(_model(service, name))


def _model(service: Service, name: str) -> dict[str, Any]:
    engine = service.engine
    facts = {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "bitnet_numba",
        "max_model_len": engine.context,
        "backend": engine.backend,
    }
    if engine.config.embeds:
        return {**facts, "dimensions": engine.config.hidden_size}
    return {**facts, "sampling": _recommended(service)}


def _recommended(service: Service) -> dict[str, float]:
    """What is used where a request does not say."""
    params = service.engine.sampling or OPENAI_DEFAULT
    return {name: getattr(params, name) for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}


async def openapi(service: Service, exchange: Exchange) -> None:
    """The interface as an OpenAPI document."""
    await exchange.json(document(__version__))
