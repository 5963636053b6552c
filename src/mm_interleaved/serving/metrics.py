"""What GET /metrics tells Prometheus: counts of the engine, and how long clients wait."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mm_interleaved.generation.events import Event, ImageDone, TextDelta
from mm_interleaved.serving.engine_protocol import Engine
from mm_interleaved.serving.engine_statistics import EngineStatistics

logger = logging.getLogger(__name__)

PREFIX = "mm_interleaved"
WINDOW = 60.0
"""Seconds over which rates are taken."""
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The measurements of one server."""

    def __init__(self, engine: Engine):
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{PREFIX}_requests", "Answers by route and status.", ["route", "status"], registry=self._registry
        )
        self._first_token = self._histogram("seconds_to_first_token", "From request to its first text.")
        self._first_image = self._histogram("seconds_to_first_image", "From request to its first image.")
        self._registry.register(_EngineCollector(engine))

    def answered(self, route: str, status: int) -> None:
        """Counts an answer. `route` is one of a few, never what a client typed."""
        self._requests.labels(route, str(status)).inc()

    def timing(self, began: float) -> Timing:
        """What sees the events of a request that began at that time."""
        return Timing(began, {TextDelta: self._first_token, ImageDone: self._first_image})

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)

    def log_failure(self, request_id: str, error: BaseException) -> None:
        """A failure of ours: the log has it whole, the client its number."""
        logger.error("request %s failed", request_id, exc_info=error)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", help, buckets=_SECONDS, registry=self._registry)


class Timing:
    """How long one request waited for the first of each kind of event."""

    def __init__(self, began: float, waiting: dict[type, Histogram]):
        self._began, self._waiting = began, waiting

    def saw(self, event: Event) -> None:
        """One event."""
        if (histogram := self._waiting.pop(type(event), None)) is not None:
            histogram.observe(time.monotonic() - self._began)


class Rate:
    """How much a growing count grows a second, over the last minute or since it is asked for."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def of(self, count: int, now: float) -> float:
        """The rate at this time."""
        while len(self._seen) > 1 and now - self._seen[1][0] >= WINDOW:
            self._seen.popleft()
        self._seen.append((now, count))
        began, first = self._seen[0]
        return (count - first) / (now - began) if now > began else 0.0


class _EngineCollector(Collector):
    """The engine's own counts, asked for when Prometheus asks."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._rates = {"text_tokens": Rate(), "images": Rate()}

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        found = self._engine.statistics()
        for name, help in (("queued", "Requests that wait."), ("running", "Requests that are answered.")):
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value=getattr(found, name))
        yield GaugeMetricFamily(f"{PREFIX}_healthy", "Whether the engine runs.", value=self._engine.healthy)
        for name, help in _COUNTS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", help, value=getattr(found, name))
        for name, rate in self._rates.items():
            value = rate.of(getattr(found, name), time.monotonic())
            yield GaugeMetricFamily(f"{PREFIX}_{name}_per_second", f"Over {WINDOW:g} seconds.", value=value)
        yield from _batches(found)
        yield from _prefixes(found)


_COUNTS = {
    "accepted": "Requests that got a place.",
    "finished": "Requests that were answered.",
    "failed": "Requests that failed.",
    "aborted": "Requests whose client left.",
    "refused": "Requests that found the queue full or the server stopping.",
    "prompt_tokens": "Tokens that were given.",
    "text_tokens": "Tokens that were written.",
    "images": "Images that were generated.",
}


def _batches(found: EngineStatistics) -> Iterator[Metric]:
    """Passes of the model by kind and number of rows."""
    family = CounterMetricFamily(
        f"{PREFIX}_batches", "Passes of the model by kind and rows.", labels=["kind", "rows"]
    )
    for kind, sizes in found.batch_sizes.items():
        for rows, passes in sorted(sizes.items()):
            family.add_metric([kind, str(rows)], passes)
    yield family


def _prefixes(found: EngineStatistics) -> Iterator[Metric]:
    """What is remembered of conversations."""
    for name, help in _PREFIXES.items():
        yield CounterMetricFamily(f"{PREFIX}_{name}", help, value=getattr(found, name))
    prompts = found.prefix_hits + found.prefix_misses
    rate = found.prefix_hits / prompts if prompts else 0.0
    yield GaugeMetricFamily(f"{PREFIX}_prefix_hit_rate", "Share of prompts, since the start.", value=rate)
    yield GaugeMetricFamily(
        f"{PREFIX}_prefix_bytes", "Memory of what is remembered.", value=found.prefix_bytes
    )


_PREFIXES = {
    "prefix_hits": "Prompts whose beginning was remembered.",
    "prefix_misses": "Prompts that were read whole.",
    "prefix_tokens": "Tokens that were not read again.",
    "prefix_images": "Images that were not encoded again.",
}
