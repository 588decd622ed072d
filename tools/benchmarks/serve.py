"""A load client for the server: streams over plain asyncio connections, which cost less than what is measured.

Closed loop: a number of clients, each of which asks again as soon as its answer has ended. Open loop: requests come at
random times (a Poisson process), whether or not the ones before have been answered. Prompts are random token ids, and
answers have a fixed length, so every run does the same work. The same requests are first answered by the engine without
a server, in a process of its own.
"""

import argparse
import asyncio
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tools.benchmarks.serve_load import Answered, Load, as_json, comparison, figures, run_table, start_table

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 1 << 20  # bytes of one line


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py serve", description=__doc__.partition("\n\n")[2])
    add = parser.add_argument
    add("model", nargs="?", help="what to serve for the measurement (default: the built-in model)")
    add("--random", action="store_true", help="serve BitNet 2B4T with random weights")
    add("--url", help="measure this server instead, such as http://127.0.0.1:8000, without the engine")
    add("--clients", type=_numbers, default=[1, 8, 32], metavar="N,N", help="closed loop (default: 1,8,32)")
    add("--rate", type=float, metavar="R", help="open loop instead: requests per second")
    add("--requests", type=int, default=64, metavar="N", help="in each run, at least (default: %(default)s)")
    add("--prompt", type=int, default=64, metavar="N", help="tokens (default: %(default)s)")
    add("--answer", type=int, default=128, metavar="N", help="tokens (default: %(default)s)")
    add("--temperature", type=float, metavar="T", help="0: greedy (default: as the server samples)")
    add(
        "--starts",
        type=int,
        default=3,
        metavar="N",
        help="of either process; the fastest counts (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="write the figures to this file")
    add(
        "--server-option", action="append", default=[], metavar="OPTION",
        help="for the server that is started, and the engine, such as --server-option=--max-sequences=128",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.url and (args.model or args.random or args.server_option):
        parser.error("--url measures a server that runs: leave out the model and its options")
    if args.model and args.random:
        parser.error("either a model or --random")
    for name in ("requests", "prompt", "answer", "starts"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    if args.rate is not None and not 0 < args.rate < math.inf:
        parser.error("--rate must be a positive number")
    return args


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return numbers


def main(argv: list[str]) -> int:
    """The command line; prints tables and their figures as JSON."""
    args = parse(argv)
    loads = [
        Load(
            clients, args.rate, max(args.requests, 2 * (clients or 0)), args.prompt, args.answer, args.temperature, seed
        )
        for seed, clients in enumerate(args.clients if args.rate is None else [None])
    ]
    if args.url:
        found: dict[str, Any] = {"runs": [_compared(load, measure(args.url, load, None), None) for load in loads]}
    else:
        with _complete(args) as model:
            found = _against_engine([*([str(model)] if model else []), *args.server_option], loads, args.starts)
    print("\n".join(run_table(found["runs"])))
    if "starts" in found:
        print("\n" + "\n".join(start_table(found["starts"])))
    print(f"\n```json\n{json.dumps(found)}\n```")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


@contextlib.contextmanager
def _complete(args: argparse.Namespace) -> Iterator[str | Path | None]:
    """The model to serve. A folder without a tokenizer gets a random one, in a folder beside it."""
    from bitnet_numba.checkpoint.packed import open_packed
    from tools.benchmarks.inputs import write_random_packed, write_random_tokenizer

    given = Path(args.model or "")
    if not args.random and (args.model is None or not given.is_dir() or (given / "tokenizer.json").exists()):
        yield args.model
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        if args.random:
            write_random_packed(folder, "bf16")
        else:
            folder.mkdir()
            for file in given.iterdir():
                (folder / file.name).symlink_to(file.resolve())
        write_random_tokenizer(folder, open_packed(folder).config.vocab_size)
        yield folder


def _against_engine(options: list[str], loads: list[Load], starts: int) -> dict[str, Any]:
    """The figures of a server and of the engine; one is closed before the other starts."""
    best: dict[str, dict[str, float]] = {}
    answered: dict[str, list[dict[str, Any]]] = {"engine": [], "server": []}
    for turn in range(starts):
        for who, started in (("engine", _engine), ("server", own_server)):
            with started(options) as process:
                for load in loads if turn == starts - 1 else ():
                    answered[who].append(process.measure(load))
                process.end_MB = resident(process.pid)
            least = best.setdefault(who, {"ready_s": math.inf, "ready_MB": 0.0, "end_MB": 0.0})
            least["ready_s"] = min(least["ready_s"], process.ready_s)
            least["ready_MB"], least["end_MB"] = process.ready_MB, process.end_MB
    runs = [_compared(*run) for run in zip(loads, answered["server"], answered["engine"], strict=True)]
    return {"runs": runs, "starts": best}


def _compared(load: Load, server: dict[str, Any], engine: dict[str, Any] | None) -> dict[str, Any]:
    compared = comparison(server, engine) if engine else None
    return {"load": load.name, **load.__dict__, "server": server, "engine": engine, "comparison": compared}


@dataclass
class Started:
    """A process that can answer."""

    process: subprocess.Popen[str]
    began: float
    url: str = ""  # of a server
    end_MB: float = math.nan
    ready_s: float = field(init=False)
    ready_MB: float = field(init=False)

    def __post_init__(self) -> None:
        self.ready_s, self.ready_MB = time.perf_counter() - self.began, resident(self.pid)

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    def measure(self, load: Load) -> dict[str, Any]:
        """The figures of one run."""
        if self.url:
            return measure(self.url, load, self.pid)
        assert self.process.stdin and self.process.stdout
        print(as_json(load), file=self.process.stdin, flush=True)
        figures: dict[str, Any] = json.loads(self.process.stdout.readline() or _ended(self.process))
        return figures


def _ended(process: subprocess.Popen[str]) -> str:
    raise SystemExit(f"the engine's process ended with code {process.wait()}")


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }


@contextlib.contextmanager
def _engine(options: list[str]) -> Iterator[Started]:
    """The engine without a server."""
    command, began = [sys.executable, "-m", "tools.benchmarks.serve_engine", *options], time.perf_counter()
    with subprocess.Popen(
        command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        if not process.stdout.readline():
            _ended(process)
        yield Started(process, began)
        process.stdin.close()


@contextlib.contextmanager
def own_server(options: list[str]) -> Iterator[Started]:
    """A server on a port of its own."""
    command, began = [sys.executable, "-m", "bitnet_numba", "serve", *options, "--port", "0"], time.perf_counter()
    with subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                found = re.search(r" answers at (\S+) ", line)
                if found:
                    started = Started(process, began, found[1])
                    threading.Thread(target=process.stderr.read, daemon=True).start()  # it may go on to talk
                    yield started
                    return
            raise SystemExit(f"the server did not start: {''.join(said)}")
        finally:
            process.terminate()


def resident(process: int) -> float:
    """Resident memory of a process, MB; NaN if it is not known."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
    return math.nan


def measure(url: str, load: Load, process: int | None) -> dict[str, Any]:
    """The figures of a server for one load. process: its number, if its processor time is to be measured."""
    asyncio.run(_answers(url, load.warm_up()))
    cpu, began = _cpu_seconds(process), time.perf_counter()
    answers = asyncio.run(_answers(url, load))
    seconds, used = time.perf_counter() - began, _cpu_seconds(process)
    return figures(answers, seconds, None if cpu is None or used is None else used - cpu)


def _cpu_seconds(process: int | None) -> float | None:
    """Processor time of a process so far; None if it is not known."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _answers(url: str, load: Load) -> list[Answered]:
    bodies = [
        json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        for body in load.bodies()
    ]
    if load.clients is None:
        start, tasks = time.perf_counter(), []
        for body, due in zip(bodies, load.times(), strict=True):
            await asyncio.sleep(due - (time.perf_counter() - start))
            tasks.append(asyncio.create_task(_ask(url, body)))
        return await asyncio.gather(*tasks)
    left, answers = iter(bodies), list[Answered]()

    async def client() -> None:
        for body in left:
            answers.append(await _ask(url, body))

    await asyncio.gather(*[client() for _ in range(load.clients)])
    return answers


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
