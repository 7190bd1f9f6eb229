"""The metrics, as Prometheus reads them."""

import re
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from llm import ScriptedEngine
from llm.caller import Report
from llm.errors import GenerationFailed
from llm.generation import Timings
from service.entry.admission import Admission
from service.entry.quota import LocalQuota
from service.errors import Problem
from service.records.metrics import Metrics, metrics_router
from service.records.record import Record

ADA = {"chain": "chat", "key": "ada"}


@pytest.fixture
def metrics() -> Metrics:
    engine = ScriptedEngine(max_slots=3)
    engine.wait_until_ready()
    return Metrics(engine, Admission(engine, LocalQuota(None), max_queue=1, max_concurrent=None, has_keys=False))


def record(**fields: object) -> Record:
    record = Record(id="1", method="POST", path="/chat/invoke", client="")
    record.chain, record.key, record.endpoint, record.status = "chat", "ada", "invoke", 200
    for name, value in fields.items():
        setattr(record, name, value)
    return record


def report(*, finish_reason: str = "stop", admitted: float | None = 10.5, tokens: tuple[float, ...] = ()) -> Report:
    timings = Timings(queued=10.0, admitted=admitted, tokens=list(tokens), ended=13.0)
    error = GenerationFailed("failed") if finish_reason == "error" else None
    return Report(
        prompt_tokens=7,
        cached_tokens=2,
        completion_tokens=len(tokens),
        finish_reason=finish_reason,
        error=error,
        timings=timings,
    )


def test_the_engine_is_looked_at_when_it_is_asked_for(metrics: Metrics) -> None:
    value = metrics.registry.get_sample_value
    assert value("serve_up") == 1
    assert value("serve_slots") == 3
    for name in ("num_requests_running", "num_requests_waiting", "http_requests_inside", "kv_cache_usage_perc"):
        assert value(f"serve_{name}") == 0
    for name in ("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "engine_restarts"):
        assert value(f"serve_{name}_total") == 0


def test_a_generation_counts_its_tokens_and_its_times(metrics: Metrics) -> None:
    metrics.count_generation(report(tokens=(11.0, 11.5, 12.0)), record())
    value = metrics.registry.get_sample_value
    assert value("serve_prompt_tokens_total", ADA) == 7
    assert value("serve_generation_tokens_total", ADA) == 3
    assert value("serve_request_success_total", {**ADA, "finished_reason": "stop"}) == 1
    for name, total, times in (
        ("time_to_first_token_seconds", 1.0, 1),
        ("inter_token_latency_seconds", 1.0, 2),
        ("e2e_request_latency_seconds", 3.0, 1),
        ("request_queue_time_seconds", 0.5, 1),
        ("request_prompt_tokens", 7, 1),
        ("request_generation_tokens", 3, 1),
    ):
        assert (value(f"serve_{name}_sum", ADA), value(f"serve_{name}_count", ADA)) == (total, times), name


def test_a_generation_that_never_had_a_slot_has_no_tokens_and_no_times(metrics: Metrics) -> None:
    metrics.count_generation(report(admitted=None, finish_reason="cancelled"), record())
    value = metrics.registry.get_sample_value
    assert value("serve_request_success_total", {**ADA, "finished_reason": "cancelled"}) == 1
    assert value("serve_prompt_tokens_total", ADA) is None
    assert value("serve_e2e_request_latency_seconds_count", ADA) is None


def test_requests_and_refusals_are_counted(metrics: Metrics) -> None:
    metrics.count_request(record())
    metrics.count_request(record(status=503, problem=Problem(503, "queue_full", "full")))
    metrics.count_request(record(chain="", key="", endpoint="", status=401, problem=Problem(401, "unauthorized", "no")))
    value = metrics.registry.get_sample_value
    assert value("serve_http_requests_total", {**ADA, "endpoint": "invoke", "status": "200"}) == 1
    assert value("serve_http_requests_total", {**ADA, "endpoint": "invoke", "status": "503"}) == 1
    assert value("serve_refusals_total", {**ADA, "reason": "queue_full"}) == 1
    assert value("serve_refusals_total", {"chain": "", "key": "", "reason": "unauthorized"}) == 1


@pytest.mark.parametrize("accept", ["", "text/plain", "application/openmetrics-text; version=1.0.0", "*/*", "nonsense"])
async def test_prometheus_reads_them(metrics: Metrics, accept: str) -> None:
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    metrics.count_generation(report(tokens=(11.0,)), record())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.get("/metrics", headers={"Accept": accept})
    assert answer.headers["content-type"].startswith("application/openmetrics" if "open" in accept else "text/plain")
    assert "version=" in answer.headers["content-type"]
    families = {family.name for family in text_string_to_metric_families(answer.text.replace("# EOF\n", ""))}
    assert {"serve_up", "serve_generation_tokens", "serve_time_to_first_token_seconds"} <= families


async def read(app: FastAPI, key: str, accept: str = "") -> str:
    async def keyed(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": {"key": key}}, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(keyed), base_url="http://localhost") as client:
        response = await client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    return response.text


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
async def test_a_key_sees_its_own_series_and_those_of_the_service(metrics: Metrics, accept: str) -> None:
    metrics.count_request(record())
    metrics.count_generation(report(tokens=(11.0, 11.5)), record())
    metrics.count_request(record(key="bob", problem=Problem(429, "rate_limited", "")))
    metrics.count_request(record(key="", problem=Problem(401, "unauthorized", "")))
    app = FastAPI()
    app.include_router(metrics_router(metrics, ["boss"]))
    alone, all_keys = await read(app, "ada", accept), await read(app, "boss", accept)
    assert {'key="ada"', 'key="bob"', 'key=""'} == set(re.findall(r'key="\w*"', all_keys))
    assert set(re.findall(r'key="\w*"', alone)) == {'key="ada"'}
    assert "unauthorized" not in alone
    for line in all_keys.splitlines():  # but for times and such, all that is not another's
        if line.startswith("serve_") and "key=" not in line:
            assert line in alone
    families = {family.name: family.samples for family in text_string_to_metric_families(alone)} if not accept else {}
    if families:
        (sample,) = [one for one in families["serve_generation_tokens"] if one.name.endswith("_total")]
        assert (sample.labels, sample.value) == ({"chain": "chat", "key": "ada"}, 2)


async def test_without_keys_everybody_sees_all(metrics: Metrics) -> None:
    metrics.count_request(record(key="ada"))
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    assert 'key="ada"' in await read(app, "")


@pytest.mark.parametrize(
    "accept", ["application/openmetrics-text; version=zebra;;;q=zebra", "application/openmetrics-text; version=", ";;"]
)
async def test_whatever_a_client_accepts_there_are_metrics(metrics: Metrics, accept: str) -> None:
    app = FastAPI()
    app.include_router(metrics_router(metrics))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.get("/metrics", headers={"Accept": accept})
    assert answer.status_code == 200
    assert "serve_slots" in answer.text
