"""What /metrics tells, for Prometheus."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from bitnet_numba.engine.completion import Stats

CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
_FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_BETWEEN = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1)
_WHOLE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, all named bitnet_numba_..."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "bitnet_numba_requests", "HTTP requests, by path and status", ("path", "status"), registry=self.registry
        )
        self._prompt_tokens = self._counter("prompt_tokens", "tokens of prompts")
        self._cached_tokens = self._counter("cached_tokens", "tokens of prompts that were in the cache already")
        self._generated_tokens = self._counter("generated_tokens", "tokens of answers")
        self._first = self._histogram("time_to_first_token_seconds", "from a request to its first text", _FIRST)
        self._between = self._histogram("time_per_token_seconds", "mean time between tokens of an answer", _BETWEEN)
        self._whole = self._histogram("answer_seconds", "from a request to the end of its answer", _WHOLE)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"bitnet_numba_{name}", meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"bitnet_numba_{name}", meaning, buckets=buckets, registry=self.registry)

    def gauge(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Adds a value that is asked for when it is looked at."""
        Gauge(f"bitnet_numba_{name}", meaning, registry=self.registry).set_function(read)

    def first_text(self, seconds: float) -> None:
        """A request got its first text."""
        self._first.observe(seconds)

    def answered(self, stats: Stats, seconds: float) -> None:
        """An answer has ended; `seconds` after the request came."""
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._cached_tokens.inc(stats.reused_tokens)
        self._generated_tokens.inc(stats.generated_tokens)
        self._whole.observe(seconds)
        if stats.generated_tokens > 1:
            self._between.observe(stats.decode_seconds / (stats.generated_tokens - 1))

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)
