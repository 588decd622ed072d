"""Renders chat templates as transformers does: with Jinja's sandbox, in a process of its own that may be lost.

The sandbox keeps a template away from files and code, but not from working for ever, so `template_process` runs this
file as a script. It imports nothing of the package, which keeps its start short.

Requests and replies are JSON behind their length: [source, variables or null] -> {"text" or "error" or "limit": ...}.
"""

import contextlib
import faulthandler
import functools
import json
import os
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

MAX_MEMORY = 1 << 30  # bytes of address space
MAX_TEXT = 1 << 24  # characters of a rendered text
LENGTH_BYTES = 8


@functools.lru_cache(maxsize=8)
def compile_template(source: str) -> Any:
    """A compiled template. Raises nearly anything if it is not valid."""
    from jinja2 import nodes
    from jinja2.ext import Extension, do, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks an answer for training: its body is rendered as it is."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, do, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def render(source: str, variables: Mapping[str, Any]) -> str:
    """The text that a template makes of its variables. Raises whatever the template causes."""
    return str(compile_template(source).render(**variables))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Arguments in the order that transformers gives them; not escaped for HTML, unlike Jinja's own filter.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(message)


def answer(request: bytes) -> dict[str, str]:
    """The reply to a request: its text, or its error, or the limit that it hit."""
    try:
        source, variables = json.loads(request)
        if variables is None:
            compile_template(source)
            return {"text": ""}
        text = render(source, variables)
    except MemoryError:
        return {"limit": f"it needs more than {MAX_MEMORY >> 20} MB of memory"}
    except Exception as error:  # whatever it is, the template caused it
        return {"error": (str(error) or type(error).__name__)[:1000]}
    if len(text) > MAX_TEXT:
        return {"limit": f"it makes a text of {len(text):,} characters"}
    return {"text": text}


def limit_process() -> None:
    """Bounds memory where the system can, and lets this process write no file."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on Windows; macOS knows the limit, but refuses it
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))


def main() -> None:
    """Answers requests on standard input until it ends, which is also how the death of the parent shows."""
    seconds = float(sys.argv[1])
    sys.path += sys.argv[2:]  # where Jinja is installed: a start without `site` takes half the time
    import jinja2.sandbox  # noqa: F401

    limit_process()
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    with open(os.devnull, "w") as nowhere:
        while len(header := requests.read(LENGTH_BYTES)) == LENGTH_BYTES:
            request = requests.read(int.from_bytes(header, "big"))
            # A watchdog outside the interpreter: it ends this process even in the middle of one long operation.
            faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
            data = json.dumps(answer(request)).encode()
            faulthandler.cancel_dump_traceback_later()
            replies.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
            replies.flush()


if __name__ == "__main__":
    main()
