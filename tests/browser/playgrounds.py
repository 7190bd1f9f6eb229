"""LangServe's two playgrounds as a person sees them: fields, buttons, what they show."""

import re
from itertools import pairwise
from typing import Protocol

from playwright.sync_api import Locator, Page, Route, expect

OUTPUT = "div.whitespace-pre-wrap.rounded-2xl"
"""Where the form playground shows the answer."""

SHARE_LINK = re.compile(r"/c/\S+/playground$")

ANSWER = ".group:has(option[value=ai]:checked) [aria-hidden=true]"
"""Where the chat playground shows answers; the first of these on the page is the latest."""

RECORD_STATES = """selector => {
    window.states = [];
    new MutationObserver(() => {
        const text = document.querySelector(selector)?.textContent.trim();
        if (text && text !== "..." && text !== window.states.at(-1)) window.states.push(text);
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""
"""Notes every text that the element has."""


class Place(Protocol):
    """Where the service is: a server, or a proxy in front of one."""

    url: str


class FormPlayground:
    """The playground with a form: options, inputs, the output."""

    def __init__(self, page: Page, server: Place, chain: str, config_hash: str = "") -> None:
        self.page = page
        share = f"/c/{config_hash}" if config_hash else ""
        page.goto(f"{server.url}/{chain}{share}/playground/", wait_until="networkidle")
        self.start_button = page.get_by_role("button", name="Start")
        self.stop_button = page.get_by_role("button", name="Stop", exact=False).filter(has_text="Stop")
        self.output = page.locator(OUTPUT)
        expect(page.get_by_role("heading", name="Try it")).to_be_visible()

    def field(self, name: str) -> Locator:
        """The box of an input or option, by its name in requests."""
        return self.page.locator(f".root_properties_{name}")

    def fill(self, **values: object) -> None:
        """Type inputs or options, by their names in requests."""
        for name, value in values.items():
            self.field(name).locator("input, textarea").fill(str(value))
            self._settle()

    def add_stop(self, text: str) -> None:
        """Add a stop string."""
        self.page.get_by_role("button", name="Add to Stop").click()
        self.page.locator("table textarea").last.fill(text)
        self._settle()

    def start(self) -> None:
        """Start, once the form is ready: it rests for a moment after options have changed."""
        self.start_button.click()

    def run(self) -> str:
        """Start, and return the output once it is complete."""
        self.start()
        expect(self.output).to_be_visible()
        expect(self.start_button).to_be_enabled(timeout=30_000)
        return self.output.inner_text().strip()

    def _settle(self) -> None:
        """Let the form take in what was typed: 10 ms later it hands its data up and gets it back, and what a machine
        types into another field in between is lost."""
        self.page.evaluate("() => new Promise(done => setTimeout(done, 50))")

    def share_link(self) -> str:
        """The address that opens the form with its options as they are."""
        self.page.get_by_role("button", name="Share").click()
        return self.page.get_by_role("dialog").get_by_text(SHARE_LINK).inner_text()

    def record_states(self) -> None:
        """Begin to note each state of the output."""
        self.page.evaluate(RECORD_STATES, OUTPUT)

    def states(self) -> list[str]:
        """The states of the output so far."""
        states: list[str] = self.page.evaluate("window.states")
        return states


class ChatPlayground:
    """The playground with a conversation.

    It has no fields for options, and a small model may ramble on: `options` are put into its requests on their way.
    """

    def __init__(self, page: Page, server: Place, **options: object) -> None:
        self.page = page
        if options:
            page.route("**/chat/stream_log", lambda route: add_options(route, options))
        # The page takes messages before it knows what to send them as: it still waits for the chain's schemas then.
        page.goto(f"{server.url}/chat/playground/", wait_until="networkidle")
        self.box = page.get_by_placeholder("Send a message...")
        self.toasts = page.locator(".Toastify__toast")
        expect(self.box).to_be_visible()

    def send(self, text: str) -> None:
        """Send a message."""
        self.box.fill(text)
        self.box.press("Enter")

    def ask(self, text: str) -> str:
        """Send a message, and return the answer once it is complete."""
        num_before = len(self.messages())
        self.send(text)
        expect(self._messages()).to_have_count(num_before + 2)
        expect(self.page.locator(".animate-spin")).to_have_count(0, timeout=30_000)
        return self.messages()[-1]

    def messages(self) -> list[str]:
        """The conversation, oldest message first."""
        # The page holds it the other way round.
        return [text.strip() for text in self._messages().locator("[aria-hidden=true]").all_inner_texts()][::-1]

    def record_states(self) -> None:
        """Begin to note each state of the answer."""
        self.page.evaluate(RECORD_STATES, ANSWER)

    def states(self) -> list[str]:
        """The states of the answer so far."""
        states: list[str] = self.page.evaluate("window.states")
        return states

    def _messages(self) -> Locator:
        return self.page.locator(".group:has(select)")


def add_options(route: Route, options: dict[str, object]) -> None:
    """Let a request go on with options in it."""
    body: dict[str, object] = route.request.post_data_json or {}
    route.continue_(post_data={**body, "config": {"configurable": options}})


def assert_grew(states: list[str]) -> None:
    """At least three states, each the one before it and more."""
    assert len(states) >= 3, states
    for before, after in pairwise(states):
        assert after.startswith(before)
