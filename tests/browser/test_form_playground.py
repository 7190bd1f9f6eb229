import re

import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import Shoot
from tests.browser.playgrounds import FormPlayground, assert_grew
from tests.browser.watch import Watch
from tests.scripted_server import SLOW
from tests.server import Server

STORY = (
    "The ferry to the island was cancelled on Tuesday because of a storm. The passengers spent the night in the school "
    "gym, where the villagers brought them soup and blankets."
)

STYLES = ("paragraph", "bullets", "headline", "key_points")

OPTIONS = {
    "max_tokens": "New tokens at most",
    "min_p": "Drop tokens less likely",
    "repetition_penalty": "Above 1: repeat less",
    "seed": "Same seed and input",
    "temperature": "Randomness, 0 to 2",
    "top_k": "Draw from this many",
    "top_p": "Draw from the likeliest tokens",
}

INPUTS = {
    "translate": {
        "text": "What to translate",
        "target_language": "The language to translate into",
        "source_language": "The language of the text",
        "formality": "How the reader is addressed",
    },
    "summarize": {
        "text": "What to summarize",
        "style": "The form of the summary",
        "max_words": "How long it may be",
        "language": "The language of the summary",
        "focus": "A question to keep in view",
    },
}


# LangServe's playground shows nothing of a failure; the service is to say it there.
@pytest.mark.parametrize("chain", ["translate", "summarize"])
def test_the_form_shows_every_input_and_option_with_its_description(
    scripted_server: Server, page: Page, watch: Watch, chain: str
) -> None:
    playground = FormPlayground(page, scripted_server, chain)

    for name, description in {**OPTIONS, **INPUTS[chain]}.items():
        field = playground.field(name)
        field.locator("input, textarea, select").focus()  # descriptions show in the field that is being filled in
        expect(field.locator("label")).to_have_text(re.compile(name.replace("_", " "), re.IGNORECASE))
        if name not in ("text", "target_language"):  # these say that they are required until they are filled in
            expect(field).to_contain_text(description)
    expect(page.get_by_role("button", name="Add to Stop")).to_be_visible()


@pytest.mark.parametrize("chain", ["translate", "summarize"])
def test_the_form_shows_the_chains_defaults(scripted_server: Server, page: Page, watch: Watch, chain: str) -> None:
    playground = FormPlayground(page, scripted_server, chain)

    defaults = {name: playground.field(name).locator("input").input_value() for name in OPTIONS}

    assert {name: value for name, value in defaults.items() if value} == {"temperature": "0", "repetition_penalty": "1"}


def test_the_form_explains_required_fields_and_waits_for_them(
    scripted_server: Server, page: Page, watch: Watch
) -> None:
    playground = FormPlayground(page, scripted_server, "translate")

    expect(page.get_by_text("must have required property 'text'")).to_be_visible()
    expect(playground.start_button).to_be_disabled()

    playground.fill(text="hello", target_language="German")
    expect(page.get_by_text("Validation Errors")).to_have_count(0)
    playground.field("text").locator("textarea").focus()
    expect(playground.field("text")).to_contain_text(INPUTS["translate"]["text"])
    expect(playground.start_button).to_be_enabled()


@pytest.mark.parametrize("language", ["中文", "Français", "हिन्दी", "Portuguese (Brazil)"])
def test_the_form_takes_languages_in_their_own_script(
    scripted_server: Server, page: Page, watch: Watch, language: str
) -> None:
    r"""The form checks the pattern of a language with JavaScript's regular expressions, where \w is ASCII: it refused
    the very example in the field's description."""
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text="hello", target_language=language)

    assert playground.run() == "hello"


def test_a_text_of_blanks_is_refused_by_the_form(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "summarize")
    playground.fill(text="  \n ")

    expect(page.get_by_text("must match pattern")).to_have_count(2)  # at the field and below the form
    expect(playground.start_button).to_be_disabled()


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [("temperature", 3, "must be <= 2"), ("top_p", 0, "must be > 0"), ("max_tokens", 0, "must be >= 1")],
)
def test_an_option_out_of_bounds_is_refused_by_the_form(
    scripted_server: Server, page: Page, watch: Watch, name: str, value: int, complaint: str
) -> None:
    """The bounds once stood in the schema as `ge` and `le`, which say nothing to a form."""
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text="hello", target_language="German", **{name: value})

    expect(playground.field(name)).to_contain_text(complaint)
    expect(playground.start_button).to_be_disabled()


def test_an_option_out_of_bounds_does_not_take_the_text_away(scripted_server: Server, page: Page, watch: Watch) -> None:
    """The form asks for the input schema anew with every state of its options. When the service refused half-typed
    ones, the form gave way to an error, and the text in it was lost."""
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text="hello", target_language="German")

    with page.expect_response(re.compile("/c/.*/input_schema")) as response:
        playground.add_stop("")
    page.wait_for_timeout(100)  # until the page has read it

    assert response.value.status == 200
    assert playground.field("text").locator("textarea").input_value() == "hello"


def test_options_in_the_form_reach_the_model(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(max_tokens=3)
    playground.add_stop("never")
    playground.fill(text="one two three", target_language="German")

    assert playground.run() == "one"  # tokens of the scripted model are bytes
    (body,) = watch.bodies("/translate/stream_log")
    assert body["config"] == {
        "configurable": {"max_tokens": 3, "stop": ["never"], "temperature": 0, "repetition_penalty": 1}
    }


def test_stop_strings_in_the_form_end_the_answer(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.add_stop("four")
    playground.add_stop("three")
    playground.fill(text="one two three four", target_language="German")

    assert playground.run() == "one two"


def test_a_style_is_chosen_from_a_list(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "summarize")
    select = playground.field("style").locator("select")
    assert select.input_value() == "paragraph"
    assert [option.get_attribute("value") for option in select.locator("option").all()] == ["", *STYLES]

    playground.fill(text="hello", max_words=20, language="German")
    select.select_option("bullets")
    playground.run()

    (body,) = watch.bodies("/summarize/stream_log")
    assert body["input"] == {
        "text": "hello",
        "documents": [],
        "style": "bullets",
        "max_words": 20,
        "language": "German",
    }


def test_optional_fields_can_be_filled_in_and_emptied_again(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text="hello", target_language="German", source_language="English", temperature="")
    playground.fill(source_language="")

    assert playground.run() == "hello"
    (body,) = watch.bodies("/translate/stream_log")
    assert body["input"] == {"text": "hello", "target_language": "German", "glossary": []}


def test_the_form_shows_the_answer_bit_by_bit(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(max_tokens=100)
    playground.fill(text="slow", target_language="German")
    playground.record_states()

    output = playground.run()

    assert_grew(playground.states())
    assert playground.states()[-1] == output
    assert output.startswith("word0 word1 word2 ")


def test_the_stop_button_frees_the_model(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text=SLOW, target_language="German")
    playground.start()
    expect(playground.output).to_contain_text("word1")

    playground.stop_button.click()

    expect(playground.start_button).to_be_enabled()
    page.wait_for_timeout(200)
    assert scripted_server.health()["running"] == 0


def test_a_failure_in_the_middle_shows_in_the_form(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text="fail", target_language="German")

    assert playground.run() == "it was going well"
    expect(page.get_by_role("alert")).to_contain_text("generation failed")
    assert watch.take_problems()

    playground.fill(text="hello")
    assert playground.run() == "hello"
    expect(page.get_by_role("alert")).to_have_count(0)


def test_a_refusal_by_the_service_shows_in_the_form(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(text="hello", target_language="Germn")
    playground.start()

    expect(page.get_by_role("alert")).to_contain_text(
        "input.target_language: there is no language 'Germn'; did you mean"
    )
    expect(playground.start_button).to_be_enabled()
    assert watch.take_problems()


def test_a_share_link_opens_the_form_with_its_options(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = FormPlayground(page, scripted_server, "translate")
    playground.fill(max_tokens=3)
    link = playground.share_link()

    shared = FormPlayground(page, scripted_server, "translate", config_hash=link.split("/")[-2])
    assert shared.field("max_tokens").locator("input").input_value() == "3"
    shared.fill(text="one two three", target_language="German")
    assert shared.run() == "one"


def test_the_form_translates_with_the_real_model(server: Server, page: Page, watch: Watch, shoot: Shoot) -> None:
    playground = FormPlayground(page, server, "translate")
    playground.fill(max_tokens=100)
    playground.fill(text=STORY, target_language="French")  # a short answer may be there before anything is drawn
    playground.record_states()

    output = playground.run()

    assert_grew(playground.states())
    assert playground.states()[-1] == output
    page.get_by_role("button", name="Intermediate steps").click()
    shoot("translate")


def test_the_form_summarizes_with_the_real_model(server: Server, page: Page, watch: Watch, shoot: Shoot) -> None:
    playground = FormPlayground(page, server, "summarize")
    playground.fill(max_tokens=100)
    playground.fill(text=STORY)
    long = playground.run()
    assert len(long) > 20
    shoot("summarize")

    playground.fill(max_tokens=3)
    expect(playground.start_button).to_be_enabled()
    short = playground.run()
    assert long.startswith(short)
    assert 0 < len(short) < 20
