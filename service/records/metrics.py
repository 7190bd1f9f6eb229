"""What Prometheus may ask: counters, gauges and histograms of requests, tokens and times. Knows no text of anybody's.

Names and meanings are vLLM's where it has them (docs.vllm.ai, "Metrics"), with `serve_` for `vllm:`. Labels are the
chain and the name of the key: few values, and none that a caller can make up.
"""

from collections.abc import Collection, Iterator, Sequence

from fastapi import APIRouter, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from llm.caller import Report
from llm.engine import Engine, EngineState
from service.entry.admission import Admission
from service.records.record import Record

CALLER = ("chain", "key")

SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Bounds for the time between two tokens, in seconds."""

LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)
"""Bounds for what a request waits or takes, in seconds."""

TOKENS = tuple(2.0**exponent for exponent in range(21))


class Metrics:
    """All metrics of one service. Safe to use from any thread."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, admission))
        ProcessCollector(registry=self.registry)
        self._requests = self._counter(
            "serve_http_requests", "Requests to chains that have ended.", ("endpoint", "status", *CALLER)
        )
        self._refusals = self._counter(
            "serve_refusals", "Requests that got an error, by its type.", ("reason", *CALLER)
        )
        self._finished = self._counter(
            "serve_request_success", "Generations that have ended, by how.", ("finished_reason", *CALLER)
        )
        self._prompt_tokens = self._counter("serve_prompt_tokens", "Prompt tokens of generations that got a slot.")
        self._generation_tokens = self._counter("serve_generation_tokens", "Tokens of answers.")
        self._first_token_s = self._histogram(
            "serve_time_to_first_token_seconds", "From submission to the first token.", LONG_S
        )
        self._between_tokens_s = self._histogram(
            "serve_inter_token_latency_seconds", "From one token of an answer to the next.", SHORT_S
        )
        self._whole_s = self._histogram(
            "serve_e2e_request_latency_seconds", "From submission to the last token.", LONG_S
        )
        self._queue_s = self._histogram("serve_request_queue_time_seconds", "From submission to a slot.", LONG_S)
        self._prompt_size = self._histogram("serve_request_prompt_tokens", "Prompt tokens of a generation.", TOKENS)
        self._answer_size = self._histogram("serve_request_generation_tokens", "Tokens of an answer.", TOKENS)

    def count_request(self, record: Record) -> None:
        """Count a request to a chain, or a refusal, that has ended."""
        caller = (record.chain, record.key)
        if record.problem is not None:
            self._refusals.labels(record.problem.kind, *caller).inc()
        if record.chain:
            self._requests.labels(record.endpoint, str(record.status), *caller).inc()

    def count_generation(self, report: Report, record: Record) -> None:
        """Count a generation that has ended."""
        caller = (record.chain, record.key)
        timings = report.timings
        self._finished.labels(report.finish_reason, *caller).inc()
        if timings.admitted is None:
            return
        self._queue_s.labels(*caller).observe(timings.admitted - timings.queued)
        self._prompt_tokens.labels(*caller).inc(report.prompt_tokens)
        self._generation_tokens.labels(*caller).inc(report.completion_tokens)
        self._prompt_size.labels(*caller).observe(report.prompt_tokens)
        self._answer_size.labels(*caller).observe(report.completion_tokens)
        if timings.first_token is not None:
            self._first_token_s.labels(*caller).observe(timings.first_token - timings.queued)
        between_s = self._between_tokens_s.labels(*caller)
        for earlier, later in zip(timings.tokens, timings.tokens[1:], strict=False):
            between_s.observe(later - earlier)
        if timings.ended is not None:
            self._whole_s.labels(*caller).observe(timings.ended - timings.queued)

    def _counter(self, name: str, description: str, labels: Sequence[str] = CALLER) -> Counter:
        return Counter(name, description, labels, registry=self.registry)

    def _histogram(self, name: str, description: str, bounds: Sequence[float]) -> Histogram:
        return Histogram(name, description, CALLER, registry=self.registry, buckets=bounds)


class EngineCollector(Collector):
    """Looks at the engine when Prometheus asks."""

    def __init__(self, engine: Engine, admission: Admission) -> None:
        self._engine = engine
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        """One look."""
        health = self._engine.health()
        is_up = health.state in (EngineState.READY, EngineState.DEGRADED)
        for name, description, value in (
            ("serve_up", "1 if the model is ready for work.", is_up),
            ("serve_slots", "Generations that can run at once.", health.slots),
            ("serve_num_requests_running", "Generations that have a slot.", health.running),
            ("serve_num_requests_waiting", "Generations that wait for one.", health.waiting),
            (
                "serve_http_requests_inside",
                "Requests that were let in and not yet finished.",
                self._admission.num_inside,
            ),
            (
                "serve_kv_cache_usage_perc",
                "Part of the memory for keys and values in use; 1 is all.",
                health.memory_use,
            ),
        ):
            yield GaugeMetricFamily(name, description, value)
        for name, description, value in (
            ("serve_prefix_cache_queries", "Prompt tokens that were looked for in the cache.", health.prompt_tokens),
            ("serve_prefix_cache_hits", "Prompt tokens that were found there.", health.cached_tokens),
            ("serve_num_preemptions", "Generations that had to give up their slot for a while.", health.preemptions),
            ("serve_engine_restarts", "Failures after which the engine started again.", health.restarts),
        ):
            yield CounterMetricFamily(name, description, value)


class KeyView(Collector):
    """What one key may see: series of its own, and those of the whole service."""

    def __init__(self, registry: CollectorRegistry, key: str) -> None:
        self._registry = registry
        self._key = key

    def collect(self) -> Iterator[Metric]:
        """One look."""
        for family in self._registry.collect():
            seen = Metric(family.name, family.documentation, family.type, family.unit)
            seen.samples = [sample for sample in family.samples if sample.labels.get("key", self._key) == self._key]
            yield seen


def metrics_router(metrics: Metrics, operator_keys: Collection[str] | None = None) -> APIRouter:
    """`/metrics`.

    Args:
        metrics: What is shown.
        operator_keys: Names of keys that see the series of all keys; others see those of their own. None: everybody
            sees all.
    """
    router = APIRouter(tags=["health"])

    @router.get("/metrics", response_class=Response)
    def read_metrics(request: Request) -> Response:
        """Metrics in the text format of Prometheus, or of OpenMetrics for those who ask for it."""
        try:
            encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        except Exception:  # prometheus_client (0.26) fails on some versions that are no versions
            encode, content_type = choose_encoder("")
        sees_all = operator_keys is None or request.state.key in operator_keys
        shown = metrics.registry if sees_all else KeyView(metrics.registry, request.state.key)
        return Response(encode(shown), media_type=content_type)

    return router
