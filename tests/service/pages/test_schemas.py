"""The schemas are LangServe's, made once."""

import httpx
import pytest
from fastapi import FastAPI
from langserve import add_routes

from chains import build_chains
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from service.pages.schemas import add_schemas


@pytest.mark.parametrize("name", ["input_schema", "output_schema", "config_schema"])
async def test_the_schemas_are_those_that_langserve_makes(name: str) -> None:
    ours, langserves = FastAPI(), FastAPI()
    chains = build_chains(ChatLLaMA3(llm=LLaMA3_LLM(engine=ScriptedEngine())))
    for chain in chains:
        add_schemas(ours, chain, [])
        add_routes(langserves, chain.runnable, path=f"/{chain.name}")
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(ours), base_url="http://ours") as one,
        httpx.AsyncClient(transport=httpx.ASGITransport(langserves), base_url="http://langserves") as other,
    ):
        for chain in chains:
            answer = await one.get(f"/{chain.name}/{name}")
            assert answer.headers["content-type"] == "application/json"
            assert answer.content == (await other.get(f"/{chain.name}/{name}")).content
            assert (await one.get(f"/{chain.name}/c/any/{name}")).content == answer.content
