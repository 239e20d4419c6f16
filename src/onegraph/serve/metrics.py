"""What Prometheus reads: histograms of times, counts, and the engine's state, on a registry of the server's own.

Takes: what happens to requests, as it happens; the engine's state when somebody asks. Gives: the text of /metrics.
Seconds and tokens are in the names.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from onegraph.counters import counters
from onegraph.engine.engine import EngineStats

FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
PER_TOKEN_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WHOLE_S = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
STATES = ("starting", "ready", "draining", "stopped", "failed")


class Metrics:
    """The server's metrics. `engine` gives the engine's state, its stats, and how its model was started."""

    def __init__(self, engine: Callable[[], tuple[str, EngineStats | None, str | None]]) -> None:
        self.registry = CollectorRegistry()
        self.first_token_s = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", FIRST_TOKEN_S
        )
        self.inter_token_s = self._histogram(
            "inter_token_latency_seconds", "Between the outputs of a streamed request", PER_TOKEN_S
        )
        self.per_token_s = self._histogram(
            "time_per_output_token_seconds", "Mean of a request's tokens after the first", PER_TOKEN_S
        )
        self.whole_s = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its end", WHOLE_S)
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were taken")
        self.cached_tokens = self._counter("prefix_cache_hit_tokens", "Prompt tokens that the prefix cache had")
        self.requests = self._counter("requests", "Texts that ended", "endpoint", "finish_reason")
        self.errors = self._counter("errors", "Answers with an error", "endpoint", "status")
        self.hung_up = self._counter("client_disconnects", "Clients that left before their answer ended")
        self.registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"onegraph_{name}", text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"onegraph_{name}", text, labels, registry=self.registry)


class CountErrors:
    """ASGI middleware that counts answers with an error by endpoint and status, whoever gives them."""

    def __init__(self, app: ASGIApp, metrics: Metrics, endpoints: Collection[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._endpoints = endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400:
                endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
                self._metrics.errors.labels(endpoint, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


class _EngineCollector(Collector):
    """The engine's state and the process's counters, read when they are asked for."""

    def __init__(self, engine: Callable[[], tuple[str, EngineStats | None, str | None]]) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        state, stats, start = self._engine()
        states = GaugeMetricFamily("onegraph_engine_state", "1 for the state that the engine is in", labels=["state"])
        for name in STATES:
            states.add_metric([name], float(name == state))
        yield states
        if start is not None:
            info = GaugeMetricFamily(
                "onegraph_compile_state", "1 for how the model was started: cold, warm or eager", labels=["start"]
            )
            info.add_metric([start], 1.0)
            yield info
        if stats is not None:
            used = stats.num_blocks - stats.num_free_blocks
            yield GaugeMetricFamily("onegraph_requests_running", "Sequences in the batch", value=stats.num_running)
            yield GaugeMetricFamily("onegraph_requests_waiting", "Sequences in the queue", value=stats.num_waiting)
            yield GaugeMetricFamily("onegraph_kv_blocks", "Blocks of the KV cache", value=stats.num_blocks)
            yield GaugeMetricFamily("onegraph_kv_blocks_used", "Blocks that a sequence holds", value=used)
            yield GaugeMetricFamily(
                "onegraph_kv_cache_usage_ratio", "Share of the blocks in use, 0 to 1", value=used / stats.num_blocks
            )
            yield CounterMetricFamily("onegraph_preemptions", "Preempted sequences", value=stats.num_preemptions)
            yield CounterMetricFamily(
                "onegraph_generated_tokens", "Tokens that were generated", value=stats.num_generated_tokens
            )
        events = CounterMetricFamily(
            "onegraph_events", "Compiles, cache hits and downgrades of the process", labels=["event", "reason"]
        )
        for name, count in sorted(counters.snapshot().items()):
            event, _, reason = name.partition(":")
            events.add_metric([event, reason], count)
        yield events
