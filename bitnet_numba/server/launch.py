"""Starts a server: listens at once, loads the model meanwhile, and serves until a signal ends it.

The modules that serve are imported while the model is loaded: they take a third of a second, in which the disk and the
device have work, too.
"""

import asyncio
import contextlib
import errno
import gc
import importlib.util
import logging
import os
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from time import monotonic

from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import RequestError, one_line, printable
from bitnet_numba.server.garbage import spare_collector
from bitnet_numba.server.settings import Settings

_log = logging.getLogger("bitnet_numba.server")
BACKLOG = 2048  # connections that wait to be accepted
# How long a thread of Python keeps the interpreter from another, in seconds. With the usual 5 ms, the engine would wait
# for so long after each step while text is sent to many clients.
SWITCH_INTERVAL = 0.0005
FILES = 65536  # connections and more, if the system allows so many
# When Python's garbage collector runs while a model is loaded, in which little becomes garbage unless kernels are
# compiled: that takes longer than a few seconds.
RARELY, COMPILED = (50_000, 50, 1000), 8.0
PACKAGES = ("httptools", "prometheus_client", "pydantic", "starlette", "uvicorn")  # of the extra
INSTALL = "install the extra serve, as in  pip install 'bitnet-numba[serve]'"


def check_extra() -> None:
    """Raises RequestError if a package that the server needs is not installed."""
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise RequestError(f"{name} is not installed: {INSTALL}")


def serve(settings: Settings, host: str, port: int, load_model: Callable[[], Engine]) -> int:
    """Listens, loads the model, and serves until a signal ends it; returns the exit code. Raises BitNetError."""
    _allow_many_files()
    with listen(host, port) as listener:
        address = listener.getsockname()
        shown = f"[{address[0]}]" if listener.family == socket.AF_INET6 else address[0]
        usual = gc.get_threshold()
        gc.set_threshold(*RARELY)
        try:
            _serve(settings, listener, f"http://{shown}:{address[1]}", in_background(load_model), usual)
        finally:
            gc.set_threshold(*usual)
    return 0


def _serve(
    settings: Settings, listener: socket.socket, url: str, loaded: Callable[[], Engine], threshold: tuple[int, int, int]
) -> None:
    """See `serve`. threshold: of the garbage collector, once the model is loaded."""
    began = monotonic()
    try:
        from bitnet_numba.server.app import create_app
        from bitnet_numba.server.http_server import make_server
        from bitnet_numba.server.service import Service
    except ImportError as error:
        raise RequestError(f"{one_line(error)}: {INSTALL}") from None
    service = Service(settings)
    failure: BaseException | None = None

    async def start() -> None:
        nonlocal failure
        try:
            await service.start(loaded)
        except Exception as error:
            failure, server.should_exit = error, True
            return
        spare_collector(collect=monotonic() - began > COMPILED)
        gc.set_threshold(*threshold)
        sys.setswitchinterval(SWITCH_INTERVAL)  # before, it would make two threads that import take turns too often
        engine = service.engine
        _log.info("%s answers at %s (%s, context %d)", settings.models[0], url, engine.backend, engine.context)

    @contextlib.asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        task = asyncio.get_running_loop().create_task(start())
        try:
            yield
        finally:
            task.cancel()

    server = make_server(create_app(service, lifespan), service)
    _log.info("listening on %s, loading the model ...", url)
    server.run(sockets=[listener])
    if failure is not None:
        raise failure


def in_background(load_model: Callable[[], Engine]) -> Callable[[], Engine]:
    """Begins to load a model in a thread, which does not keep the process from ending. What is returned waits for the
    model, and raises what loading it has raised."""
    loaded = Future[Engine]()

    def run() -> None:
        try:
            loaded.set_result(load_model())
        except BaseException as error:
            loaded.set_exception(error)

    threading.Thread(target=run, name="bitnet_numba load", daemon=True).start()
    return loaded.result


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises RequestError, naming the address, if there is none to be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        # create_server adds the address to the text of some errors.
        number: int = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number in errno.errorcode else one_line(error)
        raise RequestError(f"cannot listen on {printable(host, 80)} port {port}: {reason}") from None


def _allow_many_files() -> None:
    """Raises the limit of open files, which is the one of connections, as far as this process may."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if hard == resource.RLIM_INFINITY else min(FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
