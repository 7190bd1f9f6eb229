"""The forms of the chains for documents: files are chosen with a button, and steps of a long text show by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import Shoot
from tests.browser.playgrounds import FormPlayground
from tests.browser.watch import Watch
from tests.files.making import docx, encrypted_pdf, pdf
from tests.server import Server

STORY = "The ferry to the island was late.\nNobody minded."

LONG = [f"Paragraph {number} tells of the sea, and of the boats on it. " * 8 for number in range(40)]
"""More than the context holds."""


def choose(playground: FormPlayground, path: Path, content: bytes) -> Locator:
    """Choose a file, and wait until the form has read it."""
    path.write_bytes(content)
    button = playground.page.locator("input[type=file]")
    button.set_input_files(path)
    playground.page.wait_for_timeout(300)
    return button


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("story.pdf", lambda: pdf([STORY], title="The ferry")),
        ("story.docx", lambda: docx(STORY.split("\n"), title="The ferry")),
    ],
)
def test_a_file_is_chosen_with_a_button_and_summarized(
    scripted_server: Server,
    page: Page,
    watch: Watch,
    shoot: Shoot,
    tmp_path: Path,
    name: str,
    make: Callable[[], bytes],
) -> None:
    playground = FormPlayground(page, scripted_server, "summarize")
    choose(playground, tmp_path / name, make())

    output = playground.run()

    assert output.split() == f"Summarize this text: # The ferry {STORY}".split()
    (body,) = watch.bodies("/summarize/stream_log")
    assert set(body["input"]) == {"file", "documents", "style"}
    assert body["input"]["documents"] == [], "the form says so of a list that nobody filled in"
    shoot(f"upload-{name.partition('.')[2]}")


def test_why_a_file_cannot_be_read_shows_in_the_form_and_reset_takes_it_away(
    scripted_server: Server, page: Page, watch: Watch, shoot: Shoot, tmp_path: Path
) -> None:
    playground = FormPlayground(page, scripted_server, "summarize")
    choose(playground, tmp_path / "locked.pdf", encrypted_pdf())
    playground.start()

    expect(page.get_by_role("alert")).to_contain_text("input.file: the file is locked with a password")
    shoot("upload-encrypted")
    assert watch.take_problems()

    page.get_by_role("button", name="Reset").click()
    playground.fill(text="hello")
    assert playground.run() == "Summarize this text:\n\nhello"
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_form_that_says_nothing_to_summarize_is_told_so(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "summarize")
    playground.start()

    expect(page.get_by_role("alert")).to_contain_text("exactly one of text, file, documents; got none")
    assert watch.take_problems()


def test_the_steps_of_a_long_summary_show_by_name(
    scripted_server: Server, page: Page, watch: Watch, shoot: Shoot, tmp_path: Path
) -> None:
    """The names had a slash in them, which JSON Patch takes for a path: the form stood still."""
    playground = FormPlayground(page, scripted_server, "summarize")
    playground.fill(max_tokens=100)
    choose(playground, tmp_path / "long.docx", docx(LONG))

    assert playground.run().startswith("These are summaries of the parts of a text, in order.")

    steps = page.get_by_role("button", name="Intermediate steps")
    num_steps = int(steps.inner_text().split()[-1])
    assert num_steps > 3
    steps.click()
    for number in range(1, num_steps):
        expect(page.get_by_text(f"map {number} of {num_steps - 1}", exact=True)).to_be_visible()
    expect(page.get_by_text("summarize", exact=True).first).to_be_visible()
    shoot("upload-steps")


def test_documents_with_titles_are_typed_into_the_form(
    scripted_server: Server, page: Page, watch: Watch, shoot: Shoot
) -> None:
    playground = FormPlayground(page, scripted_server, "summarize")
    add_row(playground, "Documents", "The ferry", "It was late.")
    add_row(playground, "Documents", "The island", "It rained.")

    output = playground.run()

    assert output.split() == [
        "Summarize",
        "this",
        "text:",
        "#",
        "The",
        "ferry",
        "It",
        "was",
        "late.",
        "#",
        "The",
        "island",
        "It",
        "rained.",
    ]
    shoot("documents-form")


def add_row(playground: FormPlayground, name: str, *values: str) -> None:
    """Fill in a new row of a table."""
    playground.page.get_by_role("button", name=f"Add to {name}").click()
    playground.page.wait_for_timeout(100)
    cells = playground.page.locator("table", has_text=name).locator("tbody textarea, tbody input")
    first = cells.count() - len(values)
    for index, value in enumerate(values, first):
        cells.nth(index).fill(value)
        playground.page.wait_for_timeout(50)


@pytest.mark.parametrize("chain", ["translate", "brief"])
def test_a_translation_with_glossary_and_formality(
    scripted_server: Server, page: Page, watch: Watch, shoot: Shoot, chain: str
) -> None:
    playground = FormPlayground(page, scripted_server, chain)
    playground.fill(text="The ferry was late.", target_language="German")
    playground.field("formality").locator("select").select_option("formal")
    add_row(playground, "Glossary", "ferry", "Fähre")

    output = playground.run()

    assert "The ferry was late." in output
    (body,) = watch.bodies(f"/{chain}/stream_log")
    assert body["input"]["formality"] == "formal"
    assert body["input"]["glossary"] == [{"term": "ferry", "translation": "Fähre"}]
    page.get_by_role("button", name="Intermediate steps").click()
    expect(page.get_by_text("segment 1", exact=True)).to_be_visible()
    shoot(f"{chain}-form")


def test_brief_takes_a_file(scripted_server: Server, page: Page, watch: Watch, tmp_path: Path) -> None:
    playground = FormPlayground(page, scripted_server, "brief")
    playground.fill(target_language="German")
    choose(playground, tmp_path / "story.pdf", pdf([STORY]))

    assert STORY.split("\n")[0] in playground.run()


def test_a_translated_document_shows_its_segments(
    scripted_server: Server, page: Page, watch: Watch, shoot: Shoot
) -> None:
    playground = FormPlayground(page, scripted_server, "translate/document")
    playground.fill(text="Good morning!\n\nGood night!", target_language="German")

    output = playground.run()

    assert "Good night!" in output
    assert "segments" in output
    shoot("translate-document")
