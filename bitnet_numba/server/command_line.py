"""`bitnet-numba serve [MODEL]`: an HTTP server with OpenAI's interface, and a page to talk to."""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bitnet_numba.commands import complain, leaving_at_once, make_parser
from bitnet_numba.engine.loading import load
from bitnet_numba.errors import BitNetError, RequestError, one_line, printable
from bitnet_numba.model_options import MODEL_HELP, add_run_options, find_first, load_options
from bitnet_numba.server import PROG
from bitnet_numba.server.launch import check_extra, serve
from bitnet_numba.server.settings import Settings

KEYS_VARIABLE = "BITNET_NUMBA_API_KEYS"
DEFAULTS = Settings()
BUILT_IN = "bitnet-demo"
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The command line."""
    parser = make_parser(prog, description="Serve a BitNet model over HTTP, with OpenAI's interface and a page at /.")
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help=MODEL_HELP)
    add("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    add("--port", type=int, default=8000, metavar="N", help="default: %(default)s; 0: any that is free")
    add("--name", action="append", default=[], metavar="NAME", help="what requests call the model; may be repeated")
    group = parser.add_argument_group("model")
    add = group.add_argument
    add_run_options(group)
    add("--context", type=int, metavar="N", help="maximum tokens of a prompt and its answer (default: the model's)")
    group = parser.add_argument_group("load")
    add = group.add_argument
    add(
        "--max-sequences",
        type=int,
        default=DEFAULTS.max_sequences,
        metavar="N",
        help=_default("answers that run at a time"),
    )
    add("--kv-tokens", type=int, metavar="N", help="KV cache for so many tokens (default: as the backend chooses)")
    add(
        "--prefill-chunk",
        type=int,
        metavar="N",
        help="tokens of prompts computed between two tokens of running answers (default: as many as take 5 ms, or as "
        "long as the answers' own step)",
    )
    add(
        "--max-waiting",
        type=int,
        default=DEFAULTS.max_waiting,
        metavar="N",
        help=_default("answers that wait; more get status 429"),
    )
    add("--max-per-key", type=int, metavar="N", help="answers of one API key at a time (default: any number)")
    add(
        "--queue-timeout",
        type=float,
        default=DEFAULTS.queue_timeout,
        metavar="S",
        help=_default("seconds that an answer may wait for its turn"),
    )
    add(
        "--answer-timeout",
        type=float,
        default=DEFAULTS.answer_timeout,
        metavar="S",
        help=_default("seconds that one request may take"),
    )
    add(
        "--drain-timeout",
        type=float,
        default=DEFAULTS.drain_timeout,
        metavar="S",
        help=_default("seconds that open answers have to end after SIGTERM"),
    )
    add(
        "--coalesce-ms",
        type=float,
        default=DEFAULTS.coalesce * 1e3,
        metavar="MS",
        help=_default("a stream sends the text of so many milliseconds as one event"),
    )
    group = parser.add_argument_group("security")
    add = group.add_argument
    add("--api-key-file", type=Path, metavar="FILE", help=f"a key a line, besides those in {KEYS_VARIABLE}")
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a Host that requests may name; may be repeated (default: on loopback its names, otherwise any)",
    )
    add(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="another site whose pages may send requests; may be repeated (default: none)",
    )
    add(
        "--max-body",
        type=int,
        default=DEFAULTS.max_body,
        metavar="BYTES",
        help=f"most bytes of a request's body (default: {DEFAULTS.max_body >> 20} MiB)",
    )
    add(
        "--receive-timeout",
        type=float,
        default=DEFAULTS.receive_timeout,
        metavar="S",
        help=_default("seconds that a request has to arrive"),
    )
    group = parser.add_argument_group("logs")
    add = group.add_argument
    add("--log-requests", action="store_true", help="a line for each request on standard error, without its content")
    return parser


def _default(meaning: str) -> str:
    return f"{meaning} (default: %(default)g)"


def run(argv: list[str] | None = None, prog: str = PROG) -> int:
    """The command line; returns the exit code: 0, or 2 for a user's mistake."""
    parser = build_parser(prog)
    args = parser.parse_args(argv)
    try:
        settings = read_settings(args)
        check_extra()
        with _log_on_standard_error(prog):
            path, revision = find_first(args.model, args.revision)  # a download shows its progress, and Ctrl-C ends it
            load_model = partial(load, path, revision=revision, **load_options(args))
            with leaving_at_once(prog):  # an event loop that is interrupted while it starts does not end cleanly
                return serve(settings, args.host, args.port, load_model)
    except BitNetError as error:
        complain(prog, str(error))
    except MemoryError:
        complain(prog, "memory is too short; a smaller --context or --kv-tokens needs less")
    except OSError as error:
        complain(prog, one_line(error))
    return 2


@contextlib.contextmanager
def _log_on_standard_error(prog: str) -> Iterator[None]:
    """Inside, what the package logs is printed; uvicorn's own words are not, for the package says the same."""
    logger, handler = logging.getLogger("bitnet_numba"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{prog}: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def read_settings(args: argparse.Namespace) -> Settings:
    """The settings of a command line. Raises RequestError, naming the option, if one is invalid."""
    for option, most in (("port", 65535), ("max_waiting", 1 << 20)):
        _check_number(option, getattr(args, option), 0, most)
    for option in ("max_sequences", "kv_tokens", "prefill_chunk", "max_per_key", "max_body"):
        if getattr(args, option) is not None:
            _check_number(option, getattr(args, option), 1, 1 << 40)
    for option in ("queue_timeout", "answer_timeout", "drain_timeout", "receive_timeout", "coalesce_ms"):
        _check_number(option, getattr(args, option), 0, 1e9)
    hosts = args.allow_host
    if not hosts and args.host in ("localhost", "127.0.0.1", "::1"):
        hosts = LOOPBACK  # a page of another site may give its own name this machine's address
    return Settings(
        models=tuple(args.name) or (model_name(args.model),),
        api_keys=read_keys(args.api_key_file),
        allowed_hosts=tuple(host.lower() for host in hosts),
        cors_origins=tuple(origin.rstrip("/") for origin in args.cors_origin),
        max_sequences=args.max_sequences,
        tokens=args.kv_tokens,
        prefill_chunk=args.prefill_chunk,
        max_waiting=args.max_waiting,
        max_per_key=args.max_per_key,
        queue_timeout=args.queue_timeout,
        answer_timeout=args.answer_timeout,
        drain_timeout=args.drain_timeout,
        receive_timeout=args.receive_timeout,
        max_body=args.max_body,
        coalesce=args.coalesce_ms / 1e3,
        log_requests=args.log_requests,
    )


def model_name(model: str | None) -> str:
    """What requests call a model, unless an option says so: what the operator does, but a folder or file by its name
    without the path."""
    if model is None:
        return BUILT_IN
    if Path(model).is_dir():
        model = Path(model).resolve().name
    elif Path(model).is_file():
        model = Path(model).name
    return printable(model, 200)


def _check_number(option: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        name = option.replace("_", "-")
        raise RequestError(f"--{name} must be between {least:g} and {most:g}, not {value:g}")


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys of a file and of the environment. Raises RequestError if the file has none or cannot be read."""
    keys = os.environ.get(KEYS_VARIABLE, "").split()
    if file is None:
        return tuple(keys)
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--api-key-file {printable(str(file))} cannot be read: {one_line(error)}") from None
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise RequestError(f"--api-key-file {printable(str(file))} has no key, which would let anybody in")
    return (*keys, *found)
