"""The pages where the service asks for a key: browsers ask for a password, and add it to all that the pages ask for."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
from playwright.sync_api import Browser, HttpCredentials, Page, expect

from tests.browser.conftest import Shoot
from tests.browser.playgrounds import ChatPlayground, FormPlayground, Place, assert_grew
from tests.browser.watch import Watch
from tests.nginx import Nginx, find_nginx
from tests.server import Server

KEY = "key-of-the-browser-tests"


@pytest.fixture(scope="module", params=["directly", "behind-nginx"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    is_behind_nginx = request.param == "behind-nginx"
    if is_behind_nginx and find_nginx() is None:
        pytest.skip("no nginx is installed on this machine")
    log = tmp_path_factory.mktemp("server") / "log"
    root_path = "/llama" if is_behind_nginx else ""
    with (
        Server(log, script="tests/scripted_server.py", api_keys=f"browser:{KEY}", root_path=root_path) as server,
        Nginx(tmp_path_factory.mktemp("nginx"), server) if is_behind_nginx else nullcontext(server) as place,
    ):
        yield place


@pytest.fixture
def password() -> str:
    return KEY


@pytest.fixture
def page(browser: Browser, password: str) -> Iterator[Page]:
    """A fresh page of somebody who types a password when asked for one."""
    credentials: HttpCredentials = {"username": "me", "password": password}
    with browser.new_context(viewport={"width": 1200, "height": 900}, http_credentials=credentials) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


@pytest.mark.parametrize("path", ["/", "/docs", "/chat/playground/", "/translate/playground/"])
@pytest.mark.parametrize("password", ["", "a-key-that-there-is-not"])
def test_without_the_key_a_page_is_a_refusal(place: Place, page: Page, watch: Watch, path: str) -> None:
    response = page.goto(place.url + path)

    assert response is not None
    assert response.status == 401
    assert response.json()["error"]["type"] == "unauthorized"
    expect(page.get_by_text("an API key is needed")).to_be_visible()
    watch.take_problems()  # the status


def test_with_the_key_the_index_opens_and_its_command_lines_have_a_place_for_it(
    place: Place, page: Page, watch: Watch, shoot: Shoot
) -> None:
    page.goto(f"{place.url}/", wait_until="networkidle")

    expect(page.locator("pre").first).to_contain_text('-H "X-API-Key: $KEY"')
    shoot("with-a-key-index")


def test_with_the_key_the_documentation_can_try_a_chain(place: Place, page: Page, watch: Watch) -> None:
    page.goto(f"{place.url}/docs")
    page.locator("[data-path='/translate/invoke']").first.click()
    page.get_by_role("button", name="Try it out").first.click()
    page.get_by_role("button", name="Execute").first.click()

    expect(page.locator(".live-responses-table .response .response-col_status")).to_have_text("200")


def test_with_the_key_the_form_runs_and_streams(place: Place, page: Page, watch: Watch, shoot: Shoot) -> None:
    playground = FormPlayground(page, place, "translate")
    playground.fill(max_tokens=150)
    playground.fill(text="slow", target_language="German")
    playground.record_states()

    output = playground.run()

    assert_grew(playground.states())
    assert output.startswith("word0 word1 word2 ")
    shoot("with-a-key-form")


def test_with_the_key_a_share_link_works(place: Place, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, place, "translate")
    playground.fill(max_tokens=3)

    page.goto(playground.share_link(), wait_until="networkidle")

    expect(playground.field("max_tokens").locator("input")).to_have_value("3")
    playground.fill(text="one two three", target_language="German")
    assert playground.run() == "one"


def test_with_the_key_the_chat_holds_two_turns_and_streams(
    place: Place, page: Page, watch: Watch, shoot: Shoot
) -> None:
    playground = ChatPlayground(page, place, max_tokens=150)
    assert playground.ask("hello") == "hello"
    playground.record_states()

    answer = playground.ask("slow")

    assert_grew(playground.states()[1:])  # the first is the answer before
    assert playground.messages() == ["hello", "hello", "slow", answer]
    shoot("with-a-key-chat")
