import json
import shutil
import subprocess

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Shoot
from tests.browser.watch import Watch
from tests.server import Server

CHAINS = ("chat", "translate", "translate/document", "summarize", "brief")


def test_the_index_lists_the_chains_and_the_models_state(
    server: Server, page: Page, watch: Watch, shoot: Shoot
) -> None:
    page.goto(server.url)

    assert page.get_by_role("heading", level=2).all_inner_texts() == list(CHAINS)
    expect(page.get_by_text("Model embedded: ready.")).to_be_visible()
    shoot("index")


def test_the_links_of_the_index_work(scripted_server: Server, page: Page, watch: Watch) -> None:
    page.goto(scripted_server.url)
    links = {link.get_attribute("href") for link in page.get_by_role("link").all()}
    pages = [f"/{chain}/{part}" for chain in CHAINS for part in ("playground/", "input_schema", "config_schema")]
    assert {"/docs", "/health", *pages} <= links

    for link in sorted(map(str, links)):
        response = page.goto(scripted_server.url + link)
        assert response is not None
        assert response.status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl is installed on this machine")
def test_the_command_lines_of_the_index_work(scripted_server: Server, page: Page, watch: Watch) -> None:
    page.goto(scripted_server.url)
    lines = page.locator("pre").all_inner_texts()

    answers = []
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", f"{line} --silent --show-error"], capture_output=True, check=True, timeout=30
        )
        answers.append(json.loads(done.stdout)["output"])

    chat, translation, document, summary, brief = answers
    assert chat["content"] == "What is the capital of France?"
    assert translation == "Good morning, my friends!"
    assert document["text"] == "Good morning, my friends!"
    assert [segment["source"] for segment in document["segments"]] == ["Good morning, my friends!"]
    assert "The cat sat on the mat." in summary
    assert "The cat sat on the mat." in brief


def test_the_api_documentation_shows_the_operations(server: Server, page: Page, watch: Watch, shoot: Shoot) -> None:
    page.goto(f"{server.url}/docs")

    for path in ("/chat/invoke", "/translate/stream", "/summarize/batch", "/health"):
        expect(page.locator(f"[data-path='{path}']").first).to_be_visible()
    page.locator("[data-path='/translate/invoke']").first.click()
    expect(page.get_by_text("TranslateInvokeRequest").first).to_be_visible()
    shoot("docs")


@pytest.mark.parametrize("chain", CHAINS)
def test_the_api_documentation_shows_examples_that_the_service_takes(
    scripted_server: Server, page: Page, watch: Watch, chain: str
) -> None:
    """Without examples of ours, the page makes them up from patterns and bounds: a language named `N)}) -'M}p{}-`, and
    the largest seed, rounded up to one that is refused."""
    page.goto(f"{scripted_server.url}/docs")
    page.locator(f"[data-path='/{chain}/invoke']").first.click()
    body = json.loads(page.locator(".opblock.is-open .body-param__example").inner_text())

    response = page.request.post(
        f"{scripted_server.url}/{chain}/invoke", data={"input": body["input"], "config": body["config"]}
    )

    assert response.status == 200, response.text()
