"""The service as people have it on a server of theirs: under a prefix that nginx strips. See `tests/nginx.py`."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Shoot
from tests.browser.playgrounds import ChatPlayground, FormPlayground, assert_grew
from tests.browser.watch import Watch
from tests.nginx import LOCATION, Nginx, find_nginx
from tests.server import Server

pytestmark = pytest.mark.skipif(find_nginx() is None, reason="no nginx is installed on this machine")

COMPRESSING = LOCATION.replace("}", "    gzip on;\n    gzip_types *;\n    gzip_proxied any;\n}")
HOLDING_BACK = COMPRESSING.replace("}", "    proxy_ignore_headers X-Accel-Buffering;\n}")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(log, script="tests/scripted_server.py", root_path="/llama") as server:
        yield server


@pytest.fixture(scope="module")
def nginx(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(tmp_path_factory.mktemp("nginx"), server) as nginx:
        yield nginx


def test_the_links_of_the_index_work_behind_nginx(nginx: Nginx, page: Page, watch: Watch, shoot: Shoot) -> None:
    page.goto(f"{nginx.url}/")
    shoot("behind-nginx-index")
    links = {str(link.get_attribute("href")) for link in page.get_by_role("link").all()}
    assert len(links) >= 14

    for link in sorted(links):
        assert link.startswith("/llama/")
        response = page.goto(nginx.url.removesuffix("/llama") + link)
        assert response is not None
        assert response.status == 200
    # Chromium's own view of JSON has no icon but the host's, which is not the service's.
    assert all("/favicon.ico" in problem for problem in watch.take_problems())
    page.goto(f"{nginx.url}/")
    expect(page.locator("pre").first).to_contain_text(f"curl {nginx.url}/chat/invoke")


def test_the_documentation_works_behind_nginx(nginx: Nginx, page: Page, watch: Watch, shoot: Shoot) -> None:
    page.goto(f"{nginx.url}/docs")
    page.locator("[data-path='/translate/invoke']").first.click()
    page.get_by_role("button", name="Try it out").first.click()
    page.get_by_role("button", name="Execute").first.click()

    expect(page.locator(".live-responses-table .response .response-col_status")).to_have_text("200")
    (answer,) = watch.answers("/llama/translate/invoke")
    assert answer.json()["output"] == "Good morning, my friends!"
    shoot("behind-nginx-docs")


def test_the_form_runs_and_streams_behind_nginx(nginx: Nginx, page: Page, watch: Watch, shoot: Shoot) -> None:
    playground = FormPlayground(page, nginx, "translate")
    playground.fill(max_tokens=150)
    playground.fill(text="slow", target_language="German")
    playground.record_states()

    output = playground.run()

    assert_grew(playground.states())
    assert output.startswith("word0 word1 word2 ")
    shoot("behind-nginx-form")


def test_a_share_link_works_behind_nginx(nginx: Nginx, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, nginx, "translate")
    playground.fill(max_tokens=3)

    page.goto(playground.share_link(), wait_until="networkidle")

    assert page.url.startswith(f"{nginx.url}/translate/c/")
    expect(playground.field("max_tokens").locator("input")).to_have_value("3")
    playground.fill(text="one two three", target_language="German")
    assert playground.run() == "one"


def test_the_chat_holds_two_turns_and_streams_behind_nginx(
    nginx: Nginx, page: Page, watch: Watch, shoot: Shoot
) -> None:
    playground = ChatPlayground(page, nginx, max_tokens=150)
    assert playground.ask("hello") == "hello"
    playground.record_states()

    answer = playground.ask("slow")

    assert_grew(playground.states()[1:])  # the first is the answer before
    assert playground.messages() == ["hello", "hello", "slow", answer]
    shoot("behind-nginx-chat")


def test_why_a_request_failed_shows_behind_nginx(nginx: Nginx, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, nginx, "translate")
    playground.fill(text="fail", target_language="German")

    playground.run()

    expect(page.get_by_role("alert")).to_contain_text("generation failed")
    assert watch.take_problems()


def test_a_client_streams_behind_nginx(nginx: Nginx) -> None:
    text = {"text": "slow", "target_language": "German"}

    pieces = list(nginx.chain("translate").stream(text, {"configurable": {"max_tokens": 60}}))

    assert len(pieces) > 1
    assert "".join(pieces).startswith("word0 word1 word2 ")


def events_that_come_first(nginx: Nginx) -> int:
    body = {
        "input": {"text": "The dog met a lighthouse keeper, who told it of a storm. " * 8, "max_words": 500},
        "config": {"configurable": {"seed": 1, "temperature": 1, "max_tokens": 150}},
    }
    with httpx.stream("POST", f"{nginx.url}/summarize/stream", json=body, timeout=60) as response:
        return next(count for piece in response.iter_text() if (count := piece.count("event: data")))


@pytest.mark.parametrize("location", [LOCATION, COMPRESSING], ids=["plain", "compressing"])
def test_the_first_words_do_not_wait_in_nginx_for_the_others(server: Server, tmp_path: Path, location: str) -> None:
    """The service asks for that in a header: nginx needs no `proxy_buffering off`."""
    with Nginx(tmp_path, server, location=location) as nginx:
        assert events_that_come_first(nginx) < 50


def test_they_would_wait_if_nginx_did_not_mind_the_header(server: Server, tmp_path: Path) -> None:
    """So the test above can fail."""
    with Nginx(tmp_path, server, location=HOLDING_BACK) as nginx:
        assert events_that_come_first(nginx) > 50
