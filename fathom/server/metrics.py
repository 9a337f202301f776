"""What Prometheus reads: requests, tokens by class, waits, cache, money. Names are `fathom_...`, with their units."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from decimal import Decimal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fathom.api import Status

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_BETWEEN = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_RATE_SECONDS = 10.0


class Metrics:
    """The counters of one server; `requests` is how many have finished.

    status: asks the engine how it is, at every scrape.
    """

    def __init__(self, status: Callable[[], Status], clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry()
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()
        self.requests = self._hit = self._prompt = 0
        self.registry.register(_EngineState(status))
        self._requests = self._counter("requests", "Finished requests.", "protocol", "finish")
        self._refused = self._counter("refused", "Requests refused at the door.", "status")
        self._tokens = self._counter(
            "tokens", "Tokens: hit and miss of prompts, reasoning and answer of outputs.", "kind"
        )
        self._amount = self._counter("amount_usd", "What finished requests cost.")
        self._first = self._histogram("first_token_seconds", "From arrival to the first token.", _FIRST)
        self._between = self._histogram("between_tokens_seconds", "Between two tokens of a stream.", _BETWEEN)
        self._journal = Gauge(
            "fathom_ledger_waiting_rows", "Booked rows that the database has not taken yet.", registry=self.registry
        )

    def finished(self, protocol: str, finish: str, hit: int, miss: int, reasoning: int, output: int) -> None:
        """A request has ended; output includes reasoning."""
        self._requests.labels(protocol, finish).inc()
        self.requests += 1
        self._hit, self._prompt = self._hit + hit, self._prompt + hit + miss
        for kind, count in (("hit", hit), ("miss", miss), ("reasoning", reasoning), ("answer", output - reasoning)):
            self._tokens.labels(kind).inc(count)

    def refused(self, status: int) -> None:
        """A request got an error before anything was computed."""
        self._refused.labels(str(status)).inc()

    def charged(self, amount: Decimal) -> None:
        """A request was booked."""
        self._amount.inc(float(amount))

    def first_token(self, seconds: float) -> None:
        """A stream has begun."""
        self._first.observe(seconds)

    def next_token(self, seconds: float, tokens: int = 1) -> None:
        """A stream got its next tokens, `seconds` after the ones before."""
        now = self._clock()
        self._between.observe(seconds)
        self._recent.append((now, tokens))
        self._forget(now)

    @property
    def tokens_per_second(self) -> float:
        """Output tokens of the last ten seconds, a second."""
        self._forget(self._clock())
        return sum(tokens for _, tokens in self._recent) / _RATE_SECONDS

    @property
    def hit_rate(self) -> float | None:
        """The part of all prompt tokens that came from the cache."""
        return self._hit / self._prompt if self._prompt else None

    def text(self, waiting_rows: int = 0) -> bytes:
        """The exposition; waiting_rows: of the ledger, now."""
        self._journal.set(waiting_rows)
        return generate_latest(self.registry)

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] < now - _RATE_SECONDS:
            self._recent.popleft()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fathom_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"fathom_{name}", text, buckets=buckets, registry=self.registry)


class _EngineState:
    """The engine's own figures, asked at every scrape."""

    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield GaugeMetricFamily("fathom_running_requests", "Requests being computed.", value=status.running)
        yield GaugeMetricFamily("fathom_waiting_requests", "Requests in the queue.", value=status.waiting)
        for n, text in enumerate(("Bytes used of each cache tier.", "Bytes that each cache tier may use.")):
            name = ("fathom_cache_used_bytes", "fathom_cache_limit_bytes")[n]
            family = GaugeMetricFamily(name, text, labels=["tier"])
            for tier, sizes in status.tiers.items():
                family.add_metric([tier], sizes[n])
            yield family
        restored = CounterMetricFamily("fathom_restored_tokens", "Prompt tokens given back by a tier.", labels=["tier"])
        for tier, tokens in status.restored.items():
            restored.add_metric([tier], tokens)
        yield restored
