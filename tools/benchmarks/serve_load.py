"""The requests of `bench.py serve`, and the figures of a run: the same for a server and for the engine without one."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

WARM_ANSWER = 16  # tokens of each answer before a run


@dataclass
class Answered:
    """What one request took, in seconds from its start."""

    status: int
    first: float = math.nan  # its first text
    last: float = math.nan
    tokens: int = 0


@dataclass(frozen=True)
class Load:
    """One run. Prompts are random token ids, and answers have a fixed length, so every run does the same work."""

    clients: int | None  # closed loop: so many ask again as soon as their answers have ended; None: open loop
    rate: float  # open loop: requests per second, at random times (a Poisson process)
    requests: int
    prompt: int  # tokens
    answer: int
    temperature: float | None = None  # None: what the model's folder recommends
    seed: int = 0

    @property
    def name(self) -> str:
        """For a table."""
        if self.clients is None:
            return f"{self.rate:g} requests/s"
        return f"{self.clients} client{'s' if self.clients > 1 else ''}"

    def warm_up(self) -> "Load":
        """Short answers to so many other requests at once that connections, caches and compiled code are warm."""
        clients = self.clients or 1
        return replace(
            self, clients=clients, requests=clients, answer=min(self.answer, WARM_ANSWER), seed=self.seed + 1
        )

    def bodies(self) -> list[dict[str, Any]]:
        """The requests, as /v1/completions takes them."""
        dice, bodies = random.Random(self.seed), []
        for _ in range(self.requests):
            prompt = [dice.randrange(100, 1000) for _ in range(self.prompt)]
            body = {"prompt": prompt, "seed": dice.randrange(1 << 30), "max_tokens": self.answer, "ignore_eos": True}
            bodies.append(body if self.temperature is None else {**body, "temperature": self.temperature})
        return bodies

    def times(self) -> list[float]:
        """When each request of an open loop comes, in seconds from the start."""
        dice, now, times = random.Random(self.seed), 0.0, []
        for _ in range(self.requests):
            times.append(now)
            now += dice.expovariate(self.rate)
        return times


def figures(answers: Sequence[Answered], seconds: float, cpu: float | None) -> dict[str, Any]:
    """The figures of one run that took so long. cpu: seconds of processor time; None: not known."""
    done = [answer for answer in answers if answer.status == 200]
    tokens = sum(answer.tokens for answer in done)
    between = [(a.last - a.first) / (a.tokens - 1) for a in done if a.tokens > 1]
    return {
        "requests/s": len(done) / seconds,
        "tokens/s": tokens / seconds,
        "first_p50_ms": percentile([1e3 * a.first for a in done], 50),
        "first_p99_ms": percentile([1e3 * a.first for a in done], 99),
        "between_p50_ms": percentile([1e3 * b for b in between], 50),
        "between_p99_ms": percentile([1e3 * b for b in between], 99),
        "refused": len(answers) - len(done),
        "cores": None if cpu is None else cpu / seconds,
        "cpu_us_per_token": None if cpu is None or not tokens else 1e6 * cpu / tokens,
    }


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` percent of them do not exceed; None if there are none."""
    known = sorted(value for value in values if not math.isnan(value))
    return known[max(0, math.ceil(len(known) * share / 100) - 1)] if known else None


def comparison(server: dict[str, Any], engine: dict[str, Any]) -> dict[str, float | None]:
    """What a server makes of the engine's rate, and what it adds to its times."""

    def ratio(name: str) -> float | None:
        return None if not server[name] or not engine[name] else server[name] / engine[name]

    def added(name: str) -> float | None:
        return None if server[name] is None or engine[name] is None else server[name] - engine[name]

    return {
        "share_of_tokens/s": ratio("tokens/s"),
        "added_first_p50_ms": added("first_p50_ms"),
        "added_first_p99_ms": added("first_p99_ms"),
        "cpu_ratio": ratio("cpu_us_per_token"),
    }


def run_table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of Markdown: for each load the server, the engine alone, and the one against the other."""
    columns = "requests/s | tokens/s | first text, ms: p50 | p99 | between tokens, ms: p50 | p99"
    lines = [
        f"| load | | {columns} | refused | cores busy | CPU, µs a token |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for who in ("server", "engine"):
            if run[who]:
                lines.append(
                    f"| {run['load']} | {who} | " + " | ".join(_cell(value) for value in run[who].values()) + " |"
                )
        if run["comparison"]:
            share, first, last, cpu = run["comparison"].values()
            cells = [
                "",
                _cell(share, "{:.1%}"),
                _cell(first, "{:+.2f}"),
                _cell(last, "{:+.2f}"),
                "",
                "",
                "",
                "",
                _cell(cpu, "{:.1%}"),
            ]
            lines.append(f"| {run['load']} | server against engine | " + " | ".join(cells) + " |")
    return lines


def start_table(starts: dict[str, dict[str, float]]) -> list[str]:
    """Lines of Markdown: how long the processes take until they can answer, and their memory."""
    lines = ["| | ready after, s | resident then, MB | after the runs, MB |", "|---|---|---|---|"]
    names = ("ready_s", "ready_MB", "end_MB")
    for who, found in starts.items():
        lines.append(
            f"| {who} | "
            + " | ".join(f"{found[name]:.2f}" if name == "ready_s" else f"{found[name]:,.0f}" for name in names)
            + " |"
        )
    beyond = [starts["server"][name] - starts["engine"][name] for name in names]
    lines.append(f"| server beyond the engine | {beyond[0]:+.2f} | {beyond[1]:+,.0f} | {beyond[2]:+,.0f} |")
    return lines


def _cell(value: float | None, form: str = "") -> str:
    if value is None:
        return "-"
    if form:
        return form.format(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def as_json(load: Load) -> str:
    """A load in one line, for another process."""
    return json.dumps(load.__dict__)
