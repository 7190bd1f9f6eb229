"""The headers of every answer, and HEAD. That browsers mind them: see tests/browser/test_strangers.py."""

from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from service.pages.headers import AnswerHead, SecurityHeaders, policy

POLICY = "Content-Security-Policy"


def app_of(response: Response) -> Starlette:
    def answer(request: Request) -> Response:
        return response

    return Starlette(routes=[Route("/", answer, methods=["GET"])])


async def request(app: ASGIApp, method: str = "GET", path: str = "/") -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.request(method, path)


@pytest.mark.parametrize("path", ["/", "/nothing"])
async def test_every_answer_has_them(path: str) -> None:
    headers = (await request(SecurityHeaders(app_of(PlainTextResponse("hello"))), path=path)).headers

    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["X-Frame-Options"] == "DENY"
    assert headers["Referrer-Policy"] == "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-store"
    assert headers[POLICY] == policy()[POLICY]


def test_what_a_page_may_do_without_asking_for_more() -> None:
    assert policy()[POLICY].split("; ") == [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]


async def test_a_page_may_ask_for_more() -> None:
    own = policy(script="'unsafe-eval'", style="'unsafe-inline'")
    answer = await request(SecurityHeaders(app_of(HTMLResponse("<p>", headers=own))))

    assert answer.headers.get_list(POLICY) == [own[POLICY]]
    assert "script-src 'self' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; img-src" in own[POLICY]


async def test_a_file_may_be_kept_by_the_browser_that_has_the_key_and_by_nobody_else(tmp_path: Path) -> None:
    (tmp_path / "script.js").write_text("1")

    file = await request(SecurityHeaders(app_of(FileResponse(tmp_path / "script.js"))))
    own = await request(SecurityHeaders(app_of(PlainTextResponse("hello", headers={"Cache-Control": "no-cache"}))))

    assert file.headers["Cache-Control"] == "private, no-cache"
    assert own.headers["Cache-Control"] == "no-cache"


async def test_head_is_answered_as_get_without_the_body() -> None:
    hosted = FastAPI()
    hosted.get("/", response_class=PlainTextResponse)(lambda: "hello")
    app = AnswerHead(hosted)

    answer = await request(app, "HEAD")

    assert (answer.status_code, answer.content, answer.headers["Content-Length"]) == (200, b"", "5")
    assert (await request(app, "GET")).content == b"hello"
    assert (await request(app, "HEAD", "/nothing")).status_code == 404
    assert (await request(app, "POST")).status_code == 405
