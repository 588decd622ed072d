"""The server in replicas of Ray Serve, one model each; needs the extra `ray`.

    serve run bitnet_numba.server.ray:app options="2b4t --max-waiting 64" replicas=8 gpus=1

Each replica is one `bitnet-numba serve` without its own port: the same application, limits and metrics.
"""

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator
from functools import partial

from ray import serve
from ray.serve.config import RequestRouterConfig
from starlette.types import ASGIApp

from bitnet_numba.engine.loading import load
from bitnet_numba.errors import RequestError
from bitnet_numba.model_options import load_options
from bitnet_numba.server.app import create_app
from bitnet_numba.server.command_line import build_parser, read_settings
from bitnet_numba.server.garbage import spare_collector
from bitnet_numba.server.ray_proxy import ROUTER
from bitnet_numba.server.service import Service

ARGUMENTS = {"options": "", "replicas": "1", "gpus": "0", "cpus": "1"}
CHECK_PERIOD, CHECK_TIMEOUT = 2.0, 5.0  # seconds: a replica that is stopped is found after both


def app(arguments: dict[str, str]) -> serve.Application:
    """The application for `serve run`; all arguments may be left out.

    options: those of `bitnet-numba serve`, in one line; host and port are Ray's. replicas: how many, or "auto": as many
    as the load needs. gpus, cpus: what each of them has, such as 1 or 0.5; with no GPU, the CPU backend runs.

    Raises RequestError, naming it, for a wrong argument.
    """
    unknown = set(arguments) - set(ARGUMENTS)
    if unknown:
        raise RequestError(f"unknown argument {min(unknown)}: there are {', '.join(ARGUMENTS)}")
    given = {**ARGUMENTS, **arguments}
    args = build_parser().parse_args(shlex.split(given["options"]))
    settings = read_settings(args)
    actor = {"num_cpus": float(given["cpus"]), "num_gpus": float(given["gpus"])}
    deployment = serve.deployment(
        name="bitnet_numba",
        num_replicas="auto" if given["replicas"] == "auto" else int(given["replicas"]),
        ray_actor_options=actor,
        # The replica's own queue refuses what is too much, in OpenAI's form.
        max_ongoing_requests=2 * (settings.max_sequences + settings.max_waiting),
        graceful_shutdown_timeout_s=settings.drain_timeout,
        health_check_period_s=CHECK_PERIOD,
        health_check_timeout_s=CHECK_TIMEOUT,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
    )(Replica)
    return deployment.bind(given["options"])


@serve.ingress()
class Replica:
    """One process of Ray with one model."""

    async def __init__(self, options: str):  # type: ignore[misc]  # Ray awaits it
        """options: of `bitnet-numba serve`. The replica gets requests once its model is loaded."""
        args = build_parser().parse_args(shlex.split(options))
        self._service = Service(read_settings(args))
        await self._service.start(partial(load, args.model, revision=args.revision, **load_options(args)))
        spare_collector()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        @contextlib.asynccontextmanager
        async def lifespan() -> AsyncIterator[None]:
            yield

        return create_app(self._service, lifespan)

    async def check_health(self) -> None:
        """Raises RuntimeError if this replica has to be replaced."""
        status = self._service.status
        if status in ("failed", "hanging"):
            raise RuntimeError(f"the model is {status}")

    async def __del__(self) -> None:
        self._service.draining = True
        await asyncio.get_running_loop().run_in_executor(None, self._service.close)
