"""Whatever strangers get into a page does not run there: HOSTILE sets `window.stranger` if it does."""

import json
import re
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from langserve.lzstring import LZString
from playwright.sync_api import Page, expect

from tests.browser.hostile_server import HOSTILE
from tests.browser.playgrounds import ChatPlayground, FormPlayground
from tests.browser.watch import Watch
from tests.server import Server

PAGES = ("/", "/docs", "/form/playground/", "/chat/playground/")

PUT_IN = """() => {
    for (const inline of ["window.stranger = 1", ""]) {
        const script = document.createElement("script");
        inline ? script.textContent = inline : script.src = "data:text/javascript,window.stranger=1";
        document.body.append(script);
    }
    document.body.insertAdjacentHTML("beforeend", `<img src="data:," onerror="window.stranger = 1">
        <a id="link" href="javascript:window.stranger = 1">here</a>
        <iframe srcdoc="<script>top.stranger = 1</script>">`);
    document.getElementById("link").click();
}"""


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("hostile-server") / "log"
    with Server(log, script="tests/browser/hostile_server.py") as server:
        yield server


def assert_nothing_ran(page: Page) -> None:
    page.wait_for_load_state("networkidle")
    assert page.evaluate("window.stranger") is None


@pytest.mark.parametrize("path", PAGES)
def test_a_script_that_got_into_a_page_does_not_run(hostile: Server, page: Page, watch: Watch, path: str) -> None:
    page.goto(hostile.url + path, wait_until="networkidle")
    assert watch.take_problems() == []

    page.evaluate(PUT_IN)

    assert_nothing_ran(page)
    problems = watch.take_problems()
    assert len(problems) >= 4, problems
    assert all("Content Security Policy" in problem for problem in problems), problems


def test_a_script_that_got_into_a_page_would_run_without_the_policy(hostile: Server, page: Page) -> None:
    """So the test above can fail."""
    page.route("**/", lambda route: route.fulfill(body="<body>", content_type="text/html"))
    page.goto(hostile.url)

    page.evaluate(PUT_IN)

    page.wait_for_function("window.stranger === 1")


def test_a_hostile_description_is_text(hostile: Server, page: Page, watch: Watch) -> None:
    page.goto(hostile.url)

    expect(page.get_by_text(HOSTILE).first).to_be_visible()
    assert_nothing_ran(page)


def test_a_hostile_schema_and_a_hostile_answer_are_text_in_the_form(hostile: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, hostile, "form")
    field = page.get_by_label(HOSTILE).first
    expect(field).to_have_value(HOSTILE)
    field.focus()

    assert playground.run() == HOSTILE

    page.get_by_role("button", name="Intermediate steps").click()
    assert_nothing_ran(page)


def test_a_hostile_answer_is_text_in_the_chat(hostile: Server, page: Page, watch: Watch) -> None:
    playground = ChatPlayground(page, hostile)

    assert playground.ask(HOSTILE) == HOSTILE

    assert_nothing_ran(page)


def test_a_hostile_schema_is_text_in_the_documentation(hostile: Server, page: Page, watch: Watch) -> None:
    page.goto(f"{hostile.url}/docs")

    page.locator("[data-path='/form/invoke']").first.click()

    expect(page.get_by_text(re.compile("window.stranger")).first).to_be_visible()
    assert_nothing_ran(page)
    watch.take_problems()


def share_link(options: object) -> str:
    link: str = LZString.compressToEncodedURIComponent(json.dumps(options))  # type: ignore[no-untyped-call]
    return link


@pytest.mark.parametrize("chain", ["form", "chat"])
def test_what_a_hostile_share_link_holds_is_not_in_the_page(
    hostile: Server, page: Page, watch: Watch, chain: str
) -> None:
    link = share_link({"configurable": {"stop": [HOSTILE], HOSTILE: HOSTILE}})

    response = page.goto(f"{hostile.url}/{chain}/c/{link}/playground/", wait_until="networkidle")

    assert response is not None
    assert (response.status, "stranger" in response.text()) == (200, False)
    if chain == "form":  # where the script of the page has put it
        expect(page.locator("table textarea")).to_have_value(HOSTILE)
    assert_nothing_ran(page)


def test_a_refusal_that_names_what_is_hostile_is_no_page(hostile: Server, page: Page, watch: Watch) -> None:
    response = page.goto(f"{hostile.url}/form/c/{share_link({HOSTILE: 1})}/playground/", wait_until="networkidle")

    assert response is not None
    assert response.headers["content-type"] == "application/json"
    expect(page.get_by_text(HOSTILE[:20])).to_be_visible()
    assert_nothing_ran(page)
    watch.take_problems()  # the status


@pytest.mark.parametrize(
    "path",
    [
        "/chat/c/{}/playground/",
        "/form/c/{}/input_schema",
        "/form/playground/{}",
        "/form/playground/assets/{}",
        "/{}",
        "/docs?url={}",
        "/form/playground/?{}",
    ],
)
def test_a_hostile_path_is_nowhere_in_a_page(hostile: Server, page: Page, watch: Watch, path: str) -> None:
    page.goto(hostile.url + path.format(quote(HOSTILE, safe="")), wait_until="networkidle")

    assert page.locator("img[src=x]").count() == 0
    assert_nothing_ran(page)
    assert not any("Content Security Policy" in problem for problem in watch.take_problems())
