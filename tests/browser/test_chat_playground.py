from playwright.sync_api import Page, Route, expect

from tests.browser.conftest import Shoot
from tests.browser.playgrounds import ANSWER, ChatPlayground, assert_grew
from tests.browser.watch import Watch
from tests.server import Server


def test_the_chat_playground_opens(scripted_server: Server, page: Page, watch: Watch) -> None:
    """It opens only for schemas that it knows: for others it shows a list of what it supports."""
    playground = ChatPlayground(page, scripted_server)

    expect(playground.box).to_be_editable()
    expect(page.get_by_text("only supported for")).to_have_count(0)


def test_a_conversation_of_two_turns_with_the_real_model(
    server: Server, page: Page, watch: Watch, shoot: Shoot
) -> None:
    playground = ChatPlayground(page, server, temperature=0, repetition_penalty=1, max_tokens=40)
    playground.record_states()

    first = playground.ask("What is the capital of France?")
    assert_grew(playground.states())
    assert playground.states()[-1] == first

    second = playground.ask("And what is the capital of Italy?")
    assert playground.messages() == [
        "What is the capital of France?",
        first,
        "And what is the capital of Italy?",
        second,
    ]
    assert second
    shoot("chat")

    body = watch.bodies("/chat/stream_log")[1]
    messages = body["input"]["messages"]
    assert [(message["type"], message["content"].strip()) for message in messages] == [
        ("human", "What is the capital of France?"),
        ("ai", first),
        ("human", "And what is the capital of Italy?"),
    ]


def test_a_message_of_several_lines_comes_back_as_it_was(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = ChatPlayground(page, scripted_server)

    assert playground.ask("one\n  two 🦜\n\n三") == "one\n  two 🦜\n\n三"


def test_a_failure_in_the_middle_takes_the_message_back_in_the_chat(
    scripted_server: Server, page: Page, watch: Watch
) -> None:
    playground = ChatPlayground(page, scripted_server)
    assert playground.ask("hello") == "hello"

    playground.send("fail")

    expect(playground.toasts).to_contain_text("generation failed")
    expect(playground.box).to_have_value("fail")
    assert playground.messages() == ["hello", "hello"]
    assert watch.take_problems()


def test_a_refusal_by_the_service_shows_in_the_chat(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = ChatPlayground(page, scripted_server)

    playground.send("too long " * 1000)

    expect(playground.toasts).to_be_visible()
    assert playground.messages() == []
    assert watch.take_problems()


def test_the_chat_shows_why_a_request_failed(scripted_server: Server, page: Page, watch: Watch) -> None:
    playground = ChatPlayground(page, scripted_server)

    playground.send("   ")
    expect(page.get_by_role("alert").filter(has_text="must not be empty")).to_be_visible()
    assert watch.take_problems()

    playground.send("fail")
    expect(page.locator("#failure")).to_contain_text("generation failed")  # a toast says so, too, for a moment
    expect(playground.toasts.last).to_contain_text("generation failed")
    assert watch.take_problems()


def test_a_message_that_is_sent_before_the_page_knows_its_schemas_is_answered(
    scripted_server: Server, page: Page, watch: Watch
) -> None:
    """The page asks for them again, and called a message that came before them "undefined": it was refused."""
    waiting: list[Route] = []
    page.route("**/input_schema", lambda route: waiting.append(route))  # noqa: PLW0108  # it has to be a function
    page.goto(f"{scripted_server.url}/chat/playground/")
    box = page.get_by_placeholder("Send a message...")
    box.fill("hello")
    box.press("Enter")
    expect(page.locator(ANSWER)).to_have_count(1)

    while waiting:
        waiting.pop().continue_()

    expect(page.locator(ANSWER)).to_have_text("hello")
    (body,) = watch.bodies("/chat/stream_log")
    assert body["input"] == {"messages": [{"type": "human", "content": "hello"}]}
