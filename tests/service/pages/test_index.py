import html
import re
import shlex
from typing import Any

import httpx
import pytest
from langchain_core.runnables import RunnableLambda

from tests.service.test_app import app_of, joke_chain


async def index(*, host: str = "localhost", **settings: Any) -> str:
    app = app_of(joke_chain(RunnableLambda(str)), **settings)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        headers = {"Host": host, "X-API-Key": "key-of-the-tests"}
        return (await client.get("/", headers=headers)).text


@pytest.mark.parametrize("host", ['"><script>alert(1)</script>', "a;reboot", "$(reboot)", "a' b", "[", "a:b"])
async def test_what_a_caller_calls_this_host_is_neither_markup_nor_a_command(host: str) -> None:
    page = await index(host=host, insecure=True)

    assert "joke" in page
    assert "<script" not in page
    command = re.search("<code>(.*?)</code>", page, re.DOTALL)
    assert command
    assert [word for word in shlex.split(html.unescape(command[1])) if "reboot" in word] in (
        [],
        [f"http://{host}/joke/invoke"],
    )


async def test_the_command_lines_ask_for_a_key_where_one_is_needed() -> None:
    assert "X-API-Key" not in await index()
    assert "X-API-Key: $KEY" in await index(api_keys="test:key-of-the-tests")
