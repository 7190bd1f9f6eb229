"""What a page does behind the scenes: its requests, and what it complains about."""

from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import ConsoleMessage, Error, Page, Request, Response


class Watch:
    """Records a page's requests and problems: errors on its console, and exceptions that nobody caught.

    Playwright does not report requests for icons, but one that fails is an error on the console.
    """

    def __init__(self, page: Page) -> None:
        self.requests: list[Request] = []
        self._problems: list[str] = []
        page.on("request", self._note_request)
        page.on("console", self._note_console)
        page.on("pageerror", self._note_error)

    def take_problems(self) -> list[str]:
        """All problems since the last call: a test that expects some takes them."""
        problems, self._problems = self._problems, []
        return problems

    def outside(self) -> list[str]:
        """The addresses of requests that left the machine, or tried to."""
        urls = [urlsplit(request.url) for request in self.requests]
        return [url.geturl() for url in urls if url.scheme not in ("data", "blob") and url.hostname != "127.0.0.1"]

    def answers(self, path: str) -> list[Response]:
        """What was answered at a path, oldest first."""
        return [
            response
            for request in self.requests
            if urlsplit(request.url).path == path and (response := request.response()) is not None
        ]

    def bodies(self, path: str) -> list[Any]:
        """The JSON bodies that were posted to a path, oldest first."""
        return [
            request.post_data_json
            for request in self.requests
            if request.method == "POST" and urlsplit(request.url).path == path
        ]

    def _note_request(self, request: Request) -> None:
        self.requests.append(request)

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self._problems.append(f"{message.type}: {message.text} ({message.location['url']})")

    def _note_error(self, error: Error) -> None:
        self._problems.append(f"exception: {error.message}")
