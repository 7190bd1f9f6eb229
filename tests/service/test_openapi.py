import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from pydantic import SecretStr

from chains import CHAINS, build_chains
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from service.app import create_app
from service.settings import Settings


@pytest.fixture(scope="module")
def served() -> Iterator[FastAPI]:
    engine = ScriptedEngine()
    engine.wait_until_ready(30)
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    app = create_app(Settings(), chains=build_chains(model), check=model.check, engine=engine)
    yield app
    engine.close()


@pytest.fixture(scope="module")
def description(served: FastAPI) -> dict[str, Any]:
    return served.openapi()


def test_requests_show_no_arguments_that_would_be_refused(description: dict[str, Any]) -> None:
    requests = {name: schema for name, schema in description["components"]["schemas"].items() if "Request" in name}
    assert len(requests) == len(CHAINS) * 5
    assert not any("kwargs" in schema["properties"] for schema in requests.values())


def test_a_config_hash_is_asked_for_only_where_it_is_in_the_path(description: dict[str, Any]) -> None:
    for path, operations in description["paths"].items():
        for operation in operations.values():
            asked = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert asked == set(re.findall(r"{(\w+)}", path)), path


def test_errors_are_described_as_they_are_sent(description: dict[str, Any]) -> None:
    responses = description["paths"]["/translate/invoke"]["post"]["responses"]
    assert responses["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/HTTPValidationError")
    described = description["components"]["schemas"]["HTTPValidationError"]["properties"]["error"]
    assert described["required"] == ["type", "message", "request_id"]


def test_where_there_are_keys_it_says_how_to_give_one(description: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    engine.wait_until_ready(30)
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    settings = Settings(api_keys=SecretStr("ada:0123456789abcdef"))
    keyed = create_app(settings, chains=build_chains(model), check=model.check, engine=engine).openapi()
    engine.close()

    assert keyed["security"] == [{"bearer": []}, {"header": []}, {"basic": []}]
    assert set(keyed["components"]["securitySchemes"]) == {"bearer", "header", "basic"}
    assert keyed["paths"]["/health"]["get"]["security"] == []
    assert "security" not in description


@pytest.mark.parametrize(("prefix", "servers"), [("", None), ("/llm", [{"url": "/llm"}])])
async def test_it_is_sent_with_the_prefix_under_which_the_service_is_reached(
    served: FastAPI, prefix: str, servers: list[dict[str, str]] | None
) -> None:
    transport = httpx.ASGITransport(served, root_path=prefix)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [await client.get("/openapi.json") for _ in range(2)]
    assert answers[0].headers["Content-Type"] == "application/json"
    assert answers[0].content == answers[1].content
    description = answers[0].json()
    assert description.pop("servers", None) == servers
    assert description == json.loads(json.dumps(served.openapi()))
