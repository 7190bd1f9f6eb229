"""What the service counts is what its clients count."""

import asyncio
import re
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from tests.server import Server

KEYS = {"ada": "ada-0123456789abcdef", "bob": "bob-0123456789abcdef"}
NUM_REQUESTS = 200


def read_metrics(server: Server, key: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{server.url}/metrics", headers={"X-API-Key": key}).text
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def usage_in(said: str) -> tuple[int, int, int]:
    """Answers, prompt tokens and answer tokens that a client is told of."""
    usages = re.findall(r'"usage_metadata":\{"input_tokens":(\d+),"output_tokens":(\d+)', said)
    return len(usages), sum(int(prompt) for prompt, _ in usages), sum(int(answer) for _, answer in usages)


async def test_the_metrics_of_200_requests_are_what_their_clients_count(tmp_path: Path) -> None:
    counted: Counter[tuple[str, str]] = Counter()

    async def ask(client: httpx.AsyncClient, index: int) -> None:
        name = "ada" if index % 3 else "bob"
        kind = ("invoke", "stream", "batch", "wrong")[index % 4]
        one: Any = {"messages": [["user", f"Number {index}, {'very ' * (index % 7)}well"]]}
        body = {"inputs": [one] * 2} if kind == "batch" else {"input": one}
        if kind == "wrong":
            kind, body = "invoke", {"input": {}}
        response = await client.post(f"/chat/{kind}", json=body, headers={"X-API-Key": KEYS[name]})
        answers, prompt_tokens, answer_tokens = usage_in(response.text)
        counted[name, f"{kind} {response.status_code}"] += 1
        counted[name, "answers"] += answers
        counted[name, "prompt tokens"] += prompt_tokens
        counted[name, "answer tokens"] += answer_tokens

    with Server(
        tmp_path / "log",
        script="tests/scripted_server.py",
        api_keys=",".join(f"{name}:{key}" for name, key in KEYS.items()),
        max_queue="300",
        operator_keys="ada",
    ) as server:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            await asyncio.gather(*(ask(client, index) for index in range(NUM_REQUESTS)))
        seen = await asyncio.to_thread(read_metrics, server, KEYS["ada"])
        seen_by_bob = await asyncio.to_thread(read_metrics, server, KEYS["bob"])

    def value(metric: str, **labels: str) -> float:
        return seen.get((metric, frozenset(labels.items())), 0)

    assert sum(number for (_, what), number in counted.items() if what.rpartition(" ")[2].isdigit()) == NUM_REQUESTS
    for name in KEYS:
        caller = {"chain": "chat", "key": name}
        assert value("serve_prompt_tokens_total", **caller) == counted[name, "prompt tokens"] > 0
        assert value("serve_generation_tokens_total", **caller) == counted[name, "answer tokens"] > 0
        assert value("serve_request_success_total", finished_reason="stop", **caller) == counted[name, "answers"] > 0
        assert value("serve_time_to_first_token_seconds_count", **caller) == counted[name, "answers"]
        assert value("serve_e2e_request_latency_seconds_count", **caller) == counted[name, "answers"]
        between = counted[name, "answer tokens"] - counted[name, "answers"]
        assert value("serve_inter_token_latency_seconds_count", **caller) == between
        assert value("serve_refusals_total", reason="invalid_request", **caller) == counted[name, "invoke 422"] > 0
        for endpoint, status in (("invoke", "200"), ("stream", "200"), ("batch", "200"), ("invoke", "422")):
            asked = value("serve_http_requests_total", endpoint=endpoint, status=status, **caller)
            assert asked == counted[name, f"{endpoint} {status}"] > 0
    assert value("serve_num_requests_running") == value("serve_num_requests_waiting") == 0
    assert value("serve_http_requests_inside") == 0
    assert value("serve_prefix_cache_queries_total") == sum(counted[name, "prompt tokens"] for name in KEYS)
    of_bob = {name: value for name, value in seen.items() if ("key", "bob") in name[1]}
    assert of_bob == {name: value for name, value in seen_by_bob.items() if dict(name[1]).get("key") is not None}
