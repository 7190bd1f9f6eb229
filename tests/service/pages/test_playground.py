"""The playgrounds' pages. What people see in them: see tests/browser/."""

import json
import re
from typing import Annotated

import pytest
from fastapi import FastAPI
from langchain_core.messages import HumanMessage
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel, ConfigDict, Field

from chains import Chain
from tests.service.test_app import app_of, request

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)">'

SCRIPT = re.compile(r'<script( type="module" crossorigin)? src="/[\w/.-]+"( data-openapi="/openapi.json")?></script>')


class Hostile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    text: Annotated[str, Field(description=HOSTILE)]


@pytest.fixture
def app() -> FastAPI:
    return app_of(
        Chain(
            name="hostile",
            description=HOSTILE,
            runnable=RunnableLambda(lambda value: value["text"]).with_types(input_type=Hostile, output_type=str),
            input_type=Hostile,
            messages=lambda value, _: [HumanMessage(value["text"])],
            options=dict,
            example={"text": HOSTILE},
        )
    )


@pytest.mark.parametrize("path", ["/", "/docs", "/hostile/playground/", "/hostile/c/N4XyA/playground/"])
async def test_there_is_no_script_in_a_page_but_by_its_address(app: FastAPI, path: str) -> None:
    page = (await request(app, "GET", path)).text

    assert "<img" not in page
    for script in re.findall("<script.*?>.*?</script>", page, re.DOTALL):
        assert SCRIPT.fullmatch(script)


async def test_the_schemas_of_a_chain_come_in_a_file(app: FastAPI) -> None:
    answer = await request(app, "GET", "/hostile/playground/schemas.js")
    given = re.fullmatch(r"Object\.assign\(window, (.*)\);", answer.text)

    assert answer.headers["content-type"].startswith("text/javascript")
    assert given
    schemas = json.loads(given[1])
    assert schemas.pop("FEEDBACK_ENABLED") == schemas.pop("PUBLIC_TRACE_LINK_ENABLED") == "false"
    for name, schema in schemas.items():
        assert schema == (await request(app, "GET", f"/hostile/{name.lower()}")).json()
    assert schemas["INPUT_SCHEMA"]["properties"]["text"]["description"] == HOSTILE


@pytest.mark.parametrize(
    "path", ["assets/nothing.js", "assets/", "assets", "nothing", "assets/../index.html", "index.html"]
)
async def test_a_file_that_is_not_there_is_an_error_of_the_one_shape(app: FastAPI, path: str) -> None:
    answer = await request(app, "GET", f"/hostile/playground/{path}")

    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found"


@pytest.mark.parametrize("path", ["/", "/docs", "/health", "/ready", "/hostile/playground/"])
async def test_pages_answer_head(app: FastAPI, path: str) -> None:
    answer = await request(app, "HEAD", path)

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == str(len((await request(app, "GET", path)).content))
