"""Takes the README's picture, docs/playground.png: the chat playground with an answer of the embedded model.

python -m tests.browser.screenshot
"""

import tempfile
from pathlib import Path

from tests.browser.chromium import open_chromium
from tests.browser.playgrounds import ChatPlayground
from tests.server import ROOT, Server

PICTURE = ROOT / "docs" / "playground.png"

QUESTIONS = ("What is the capital of France?", "And what is the capital of Italy?")


def main() -> None:
    """Ask, and take the picture."""
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder) / "log") as server, open_chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 680})
        playground = ChatPlayground(page, server, temperature=0, repetition_penalty=1, max_tokens=40)
        for question in QUESTIONS:
            print(question, playground.ask(question))
        PICTURE.parent.mkdir(exist_ok=True)
        page.screenshot(path=PICTURE, animations="disabled")
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
