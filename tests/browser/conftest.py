from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page

from tests.browser.chromium import find_chromium, open_chromium
from tests.browser.watch import Watch

SCREENSHOTS = Path(__file__).parent / "screenshots"

Shoot = Callable[[str], None]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium. Not for the whole session: while Playwright's synchronous API is open, its event loop counts as
    running in this thread, and asynchronous tests cannot start theirs."""
    if find_chromium() is None:
        pytest.skip("no Chromium is installed on this machine")
    with open_chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A fresh page with nothing kept from others."""
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        context.set_default_timeout(60_000)
        yield context.new_page()


@pytest.fixture
def watch(page: Page) -> Iterator[Watch]:
    """What the page does behind the scenes. At the end, there must be no problem that the test did not expect."""
    watch = Watch(page)
    yield watch
    assert watch.take_problems() == []
    assert watch.outside() == []


@pytest.fixture
def shoot(page: Page) -> Shoot:
    """Keeps a screenshot of the whole page, to be looked at."""

    def shoot(name: str) -> None:
        SCREENSHOTS.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True, animations="disabled")

    return shoot
