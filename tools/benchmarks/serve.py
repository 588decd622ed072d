"""A load client for the server: streams over plain asyncio connections, which cost less than what is measured.

Closed loop: a number of clients, each of which asks again as soon as its answer has ended. Open loop: requests come at
random times (a Poisson process), whether or not the ones before have been answered. Prompts are random token ids, and
answers have a fixed length, so every run does the same work.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 1 << 20  # bytes of one line


@dataclass
class Answered:
    """What one request took, in seconds from its start."""

    status: int
    first: float = math.nan  # its first text
    last: float = math.nan
    tokens: int = 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py serve", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("model", nargs="?", help="what to serve for the measurement (default: the built-in model)")
    add("--url", help="measure this server instead, such as http://127.0.0.1:8000")
    add("--clients", type=_numbers, default=[1, 8, 32], metavar="N,N", help="closed loop (default: 1,8,32)")
    add("--rate", type=float, metavar="R", help="open loop instead: requests per second")
    add("--requests", type=int, default=64, metavar="N", help="in each run, at least (default: %(default)s)")
    add("--prompt", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    add("--answer", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add("--server-option", action="append", default=[], metavar="OPTION", help="for the server that is started")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(argv: list[str]) -> int:
    """The command line; prints a table and its figures as JSON."""
    args = parse(argv)
    with contextlib.nullcontext((args.url, None)) if args.url else _own_server(args) as (url, process):
        runs = [measure(url, args, clients, process) for clients in (args.clients if args.rate is None else [0])]
    columns = (
        "requests/s | tokens/s | first text, ms: p50 | p99 | between tokens, ms: p50 | p99 | refused | server's CPU"
    )
    print(f"| load | {columns} |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in runs:
        print("| " + " | ".join(_cell(value) for value in run.values()) + " |")
    print(f"\n```json\n{json.dumps(runs)}\n```")
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1) + "\n")
    return 0


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


@contextlib.contextmanager
def _own_server(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """A server that runs as long as it is measured; its address and process."""
    command = [sys.executable, "-m", "bitnet_numba", "serve", *([args.model] if args.model else []), "--port", "0"]
    with subprocess.Popen([*command, *args.server_option], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                found = re.search(r" answers at (\S+) ", line)
                if found:
                    yield found[1], process.pid
                    return
            raise SystemExit(f"the server did not start: {''.join(said)}")
        finally:
            process.terminate()


def measure(url: str, args: argparse.Namespace, clients: int, process: int | None) -> dict[str, Any]:
    """The figures of one run. clients: 0 is the open loop."""
    asyncio.run(_ask(url, _body(args, random.Random(0))))  # connections, caches and compiled code are warm
    cpu, began = _cpu_seconds(process), time.perf_counter()
    answers = asyncio.run(_closed(url, args, clients) if clients else _open(url, args))
    seconds, cpu = time.perf_counter() - began, _cpu_seconds(process) - cpu
    done = [answer for answer in answers if answer.status == 200]
    between = [(a.last - a.first) / (a.tokens - 1) for a in done if a.tokens > 1]
    return {
        "load": f"{clients} clients" if clients else f"{args.rate:g} requests/s",
        "requests/s": len(done) / seconds,
        "tokens/s": sum(answer.tokens for answer in done) / seconds,
        "first_p50_ms": 1e3 * percentile([a.first for a in done], 50),
        "first_p99_ms": 1e3 * percentile([a.first for a in done], 99),
        "between_p50_ms": 1e3 * percentile(between, 50),
        "between_p99_ms": 1e3 * percentile(between, 99),
        "refused": len(answers) - len(done),
        "server_cpu": cpu / seconds,
    }


def percentile(values: list[float], share: float) -> float:
    """The smallest value that `share` percent of them do not exceed; NaN if there are none."""
    return sorted(values)[max(0, math.ceil(len(values) * share / 100) - 1)] if values else math.nan


def _cpu_seconds(process: int | None) -> float:
    """Processor time of a process so far; NaN if it is not known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return math.nan
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _body(args: argparse.Namespace, dice: random.Random) -> bytes:
    prompt = [dice.randrange(100, 1000) for _ in range(args.prompt)]
    length = {"max_tokens": args.answer, "ignore_eos": True}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"prompt": prompt, "seed": dice.randrange(1 << 30), **length, **stream}).encode()


async def _closed(url: str, args: argparse.Namespace, clients: int) -> list[Answered]:
    dice, answers = random.Random(clients), []
    left = max(args.requests, 2 * clients)

    async def client() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            answers.append(await _ask(url, _body(args, dice)))

    await asyncio.gather(*[client() for _ in range(clients)])
    return answers


async def _open(url: str, args: argparse.Namespace) -> list[Answered]:
    dice, tasks = random.Random(0), []
    for _ in range(args.requests):
        tasks.append(asyncio.create_task(_ask(url, _body(args, dice))))
        await asyncio.sleep(dice.expovariate(args.rate))
    return await asyncio.gather(*tasks)


async def _ask(url: str, body: bytes) -> Answered:
    """One request on a connection of its own."""
    address = urlsplit(url)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=LIMIT)
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    answered = Answered(int((await reader.readline()).split()[1]))
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        now = time.perf_counter() - began
        if b'"usage": {' in line:
            answered.tokens = json.loads(line[6:])["usage"]["completion_tokens"]
        elif b'"error"' in line[:20]:
            answered.status = 500
        elif b'"finish_reason": null' in line:
            answered.first = now if math.isnan(answered.first) else answered.first
            answered.last = now
    writer.close()
    return answered
