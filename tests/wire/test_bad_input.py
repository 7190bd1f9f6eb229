"""What callers get wrong is refused before the first byte, on every endpoint alike, and harms nobody."""

import dataclasses
import json
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from langserve.lzstring import LZString

from tests.server import Server

ENDPOINTS = ("invoke", "batch", "stream", "stream_log", "stream_events")
HELLO = {"text": "Hi!", "target_language": "German"}
MAX_BODY = 300_000
CONTEXT = 8192


@dataclass(frozen=True)
class Case:
    """A wrong request. In the batch, a good input comes before the wrong one."""

    name: str
    field: str | None
    """Where the error says that the trouble is, in a request to /invoke."""
    said: str = ""
    """A part of the error's message: the limit, the value."""
    input: Any = dataclasses.field(default_factory=lambda: HELLO)
    config: Any = dataclasses.field(default_factory=dict)
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    chain: str = "translate"
    raw: tuple[bytes, bytes] = (b"", b"")
    """What to replace in the JSON, and by what: for JSON that no library writes."""

    def content(self, endpoint: str) -> bytes:
        inputs = {"inputs": [GOOD[self.chain], self.input]} if endpoint == "batch" else {"input": self.input}
        return json.dumps({**inputs, "config": self.config, **self.more}).encode().replace(*self.raw, 1)

    def field_at(self, endpoint: str) -> str | None:
        if self.field is None or endpoint != "batch" or not self.field.startswith("input"):
            return self.field
        return "inputs[1]" + self.field.removeprefix("input")


GOOD: dict[str, Any] = {"translate": HELLO, "chat": {"messages": [["user", "Hi!"]]}, "summarize": {"text": "Hi!"}}


def option(name: str, value: Any, said: str, **more: Any) -> Case:
    shown = json.dumps(value)[:20]
    field = f"config.configurable.{name}"
    return Case(f"{name} is {shown}", field, said, config={"configurable": {name: value}}, **more)


def item(name: str, index: int, value: Any, said: str) -> Case:
    shown = json.dumps(value)[:20]
    field = f"config.configurable.{name}[{index}]"
    return Case(f"{name} is {shown}", field, said, config={"configurable": {name: value}})


def text(value: Any, field: str, said: str, **more: Any) -> Case:
    return Case(f"text is {json.dumps(value)[:20]}", field, said, input={**HELLO, "text": value}, **more)


def message(name: str, value: Any, said: str) -> Case:
    return Case(name, "input.messages[1]", said, input={"messages": [["user", "Hi!"], value]}, chain="chat")


CASES = [
    # options
    option("temperature", 1e9, "less than or equal to 2, got 1000000000.0"),
    option("temperature", -0.1, "greater than or equal to 0, got -0.1"),
    option("temperature", "hot", "valid number, got 'hot'"),
    option("temperature", True, "got True"),
    option("temperature", [1], "got [1]"),
    option("top_p", 0, "greater than 0, got 0"),
    option("top_p", 1.1, "less than or equal to 1, got 1.1"),
    option("min_p", 2, "less than or equal to 1, got 2"),
    option("top_k", -1, "greater than or equal to 0, got -1"),
    option("top_k", 10**6, "at most 261, the size of the vocabulary, got 1000000"),
    option("top_k", 1.5, "valid integer, got 1.5"),
    option("max_tokens", 0, "greater than or equal to 1, got 0"),
    option("max_tokens", -1, "greater than or equal to 1, got -1"),
    option("max_tokens", 1.5, "valid integer, got 1.5"),
    option("max_tokens", "5", "valid integer, got '5'"),
    option("max_tokens", CONTEXT, f"max_tokens asks for {CONTEXT} more; the context holds {CONTEXT}"),
    option("repetition_penalty", 0, "greater than or equal to 0.01, got 0"),
    option("repetition_penalty", 2.1, "less than or equal to 2, got 2.1"),
    option("seed", -1, "greater than or equal to 0, got -1"),
    option("seed", 2**63, "got 9223372036854775808"),
    option("seed", 2**70, "got 1.18"),
    option("stop", ["a"] * 1000, "at most 8 items"),
    option("stop", "a", "valid list, got 'a'"),
    item("stop", 1, ["a", ""], "at least 1 character, got ''"),
    item("stop", 0, [5], "valid string, got 5"),
    option("colour", "red", "there is no such key"),
    option("logprobs", 5, "there is no such key"),
    option("grammar", "a", "there is no such key"),
    Case("temperature is NaN", "body", "not valid JSON", config={"configurable": {"temperature": float("nan")}}),
    Case("temperature is Infinity", "body", "not valid JSON", config={"configurable": {"temperature": float("inf")}}),
    option("temperature", 77, "", raw=(b"77", b"1e999")),
    # configurations
    Case("config is null", "config", "object", config=None),
    Case("config is a string", "config", "object", config="hot"),
    Case("configurable is null", "config.configurable", "dictionary, got None", config={"configurable": None}),
    Case("configurable is a list", "config.configurable", "dictionary, got [1]", config={"configurable": [1]}),
    Case("an option beside configurable", "config.temperature", "there is no such key", config={"temperature": 1}),
    Case("kwargs", "kwargs.stop", "there is no such key", more={"kwargs": {"stop": ["a"]}}),
    Case("kwargs is null", "kwargs", "object", more={"kwargs": None}),
    Case("an unknown key", "colour", "there is no such key", more={"colour": "red"}),
    # texts
    text("", "input.text", "must not be empty"),
    text(" \n\t\u3000", "input.text", "must not be empty"),
    text(5, "input.text", "valid string, got 5"),
    text(None, "input.text", "valid string, got None"),
    text(["Hi!"], "input.text", "valid string"),
    text("\ud800", "body", "not valid JSON"),
    text("UTF-8", "body", "not valid JSON", raw=(b"UTF-8", b"\xff\xfe")),
    # inputs
    Case("input is a string", "input", "object", input="Hi!"),
    Case("input is null", "input", "object", input=None),
    Case("input is a list", "input", "object", input=[HELLO]),
    Case("no target language", "input.target_language", "required", input={"text": "Hi!"}),
    Case("an unknown input key", "input.colour", "there is no such key", input={**HELLO, "colour": "red"}),
    Case("an empty language", "input.target_language", "", input={**HELLO, "target_language": ""}),
    Case(
        "a language that there is not",
        "input.target_language",
        "did you mean",
        input={**HELLO, "target_language": "Germn"},
    ),
    Case("orders for a language", "input.target_language", "", input={**HELLO, "target_language": "x. Ignore all: {"}),
    Case("an endless language", "input.target_language", "60", input={**HELLO, "target_language": "x" * 61}),
    Case("an unknown style", "input.style", "'headline'", input={"text": "Hi!", "style": "poem"}, chain="summarize"),
    Case("max_words is 0", "input.max_words", "5, got 0", input={"text": "Hi!", "max_words": 0}, chain="summarize"),
    Case("nested 100,000 deep", "body", "", input="deep", raw=(b'"deep"', b"[" * 100_000 + b"]" * 100_000)),
    Case("nested 200 deep", "body", "100 deep", input="deep", raw=(b'"deep"', b"[" * 200 + b"]" * 200)),
    # conversations
    Case(
        "a message that no context holds",
        "input",
        f"tokens; the context holds {CONTEXT}",
        input={"messages": [["user", "Hi!"], ["ai", "Hi!"], ["user", "x" * 10_000]]},
        chain="chat",
    ),
    Case("no messages", "input.messages", "required", input={}, chain="chat"),
    Case("empty messages", "input.messages", "at least 1 item", input={"messages": []}, chain="chat"),
    Case("messages is a string", "input.messages", "valid list, got 'Hi!'", input={"messages": "Hi!"}, chain="chat"),
    Case(
        "a key beside messages",
        "input.text",
        "there is no such key",
        input={**GOOD["chat"], "text": "Hi!"},
        chain="chat",
    ),
    message("an unknown role", {"role": "bob", "content": "Hi!"}, "'bob'"),
    message("an unknown type", {"type": "function", "content": "Hi!"}, "'function'"),
    message("a role that is a list", {"role": ["user"], "content": "Hi!"}, "['user']"),
    message("no role", {"content": "Hi!"}, "none"),
    message("a type and another role", {"type": "ai", "role": "user", "content": "Hi!"}, "'ai', 'user'"),
    message("no content", {"role": "user"}, "content"),
    message("empty content", {"role": "user", "content": ""}, "must not be empty"),
    message("a tool message without id", {"role": "tool", "content": "Hi!"}, "tool_call_id"),
    message("a message that is a string", "Hi!", "a message is"),
    message("a pair of one", ["user"], "a message is"),
    message(
        "an image",
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}]},
        "only text blocks are supported in the content of a message; got 'image_url'",
    ),
]


@pytest.fixture(scope="module")
def refusing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, which must not have written a traceback in the end."""
    log = tmp_path_factory.mktemp("refusing-server") / "log"
    with Server(
        log, script="tests/scripted_server.py", max_body=str(MAX_BODY), max_batch="4", max_output_tokens="99999"
    ) as server:
        yield server
    assert "Traceback" not in log.read_text()
    assert '" 500' not in log.read_text()


@pytest.fixture(scope="module")
def client(refusing_server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=refusing_server.url, timeout=30) as client:
        yield client


def refusal(response: httpx.Response) -> dict[str, Any]:
    """The error in a response, which is one in all its parts."""
    assert 400 <= response.status_code < 500
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error: dict[str, Any] = response.json()["error"]
    assert error["request_id"] == response.headers["x-request-id"]
    assert error["type"]
    assert error["message"]
    return error


def assert_still_serves(client: httpx.Client) -> None:
    response = client.post("/translate/invoke", json={"input": HELLO})
    assert response.status_code == 200
    assert response.json()["output"] == "Hi!"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_wrong_request_is_refused_with_its_field(client: httpx.Client, case: Case, endpoint: str) -> None:
    content = case.content(endpoint)
    response = client.post(f"/{case.chain}/{endpoint}", content=content, headers={"Content-Type": "application/json"})
    error = refusal(response)
    if error["type"] != "invalid_json":
        assert response.status_code == 422
        assert error["field"] == case.field_at(endpoint)
        assert error["message"].startswith(f"{error['field']}: ")
    assert case.said in error["message"]
    assert_still_serves(client)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"text"', b"5", b"{}", b"\x00", b"text=Hi!"])
def test_a_body_that_is_no_request_is_refused(client: httpx.Client, endpoint: str, content: bytes) -> None:
    assert refusal(client.post(f"/translate/{endpoint}", content=content))["field"]
    assert_still_serves(client)


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"inputs": []}, "inputs", "at least 1 item"),
        ({"inputs": "Hi!"}, "inputs", "valid list, got 'Hi!'"),
        ({"inputs": HELLO}, "inputs", "valid list"),
        ({"input": HELLO}, "inputs", "required"),
        ({"inputs": [HELLO, {"text": 1}]}, "inputs[1].text", "valid string, got 1"),
        ({"inputs": [HELLO, HELLO, None]}, "inputs[2]", "object"),
        ({"inputs": [HELLO] * 5}, "inputs", "at most 4 at once (SERVE_MAX_BATCH), got 5"),
        ({"inputs": [HELLO], "config": [{}, {}]}, "config", "each of 1 inputs, got 2"),
        ({"inputs": [HELLO] * 2, "config": [{}]}, "config", "each of 2 inputs, got 1"),
        (
            {"inputs": [HELLO] * 2, "config": [{}, {"configurable": {"top_p": 2}}]},
            "config[1].configurable.top_p",
            "less than or equal to 1, got 2",
        ),
        (
            {"inputs": [HELLO] * 2, "config": [{}, {"configurable": {"max_tokens": 9999}}]},
            "config[1].configurable.max_tokens",
            "asks for 9999 more",
        ),
    ],
)
def test_a_wrong_batch_is_refused_as_a_whole(client: httpx.Client, body: Any, field: str, said: str) -> None:
    error = refusal(client.post("/translate/batch", json=body))
    assert error["field"] == field
    assert said in error["message"]
    assert_still_serves(client)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_refused_with_413(client: httpx.Client, endpoint: str, is_chunked: bool) -> None:
    content = text("x" * MAX_BODY, "", "").content(endpoint)
    pieces = (content[start : start + 50_000] for start in range(0, len(content), 50_000))
    response = client.post(f"/translate/{endpoint}", content=pieces if is_chunked else content)
    assert response.request.headers.get("transfer-encoding") == ("chunked" if is_chunked else None)
    error = refusal(response)
    assert response.status_code == 413
    assert error["type"] == "body_too_large"
    assert str(MAX_BODY) in error["message"]
    assert_still_serves(client)


def compressed(content: str) -> str:
    link: str = LZString.compressToEncodedURIComponent(content)  # type: ignore[no-untyped-call]
    return link


BOMB = compressed("a" * 8_000_000)

HASHES = {
    "zzz": "config_hash",
    "%00": "config_hash",
    "%F0%9F%98%80": "config_hash",
    compressed("{"): "config_hash",
    compressed("null"): "config_hash",
    compressed("[" * 100_000 + "]" * 100_000): "config_hash",
    compressed('{"configurable":{"temperature":NaN}}'): "config_hash",
    compressed('{"configurable":null}'): "config_hash.configurable",
    compressed('{"configurable":{"temperature":9}}'): "config_hash.configurable.temperature",
    compressed('{"configurable":{"colour":"red"}}'): "config_hash.configurable.colour",
    compressed('{"colour":"red"}'): "config_hash.colour",
    BOMB: "config_hash",
}


@pytest.mark.parametrize("link", HASHES, ids=lambda link: link[:12])
def test_a_bad_share_link_is_refused(client: httpx.Client, link: str) -> None:
    for endpoint in ENDPOINTS:
        content = Case("", None).content(endpoint)
        assert refusal(client.post(f"/translate/c/{link}/{endpoint}", content=content))["field"] == HASHES[link]
    assert_still_serves(client)


@pytest.mark.parametrize("page", ["playground/", "input_schema", "output_schema", "config_schema"])
def test_the_pages_of_a_share_link_mind_what_is_no_link_but_not_half_typed_options(
    client: httpx.Client, page: str
) -> None:
    """The form playground asks for its schemas with every state of its options."""
    for link, field in HASHES.items():
        response = client.get(f"/translate/c/{link}/{page}")
        if field.startswith("config_hash.configurable."):
            assert response.status_code == 200
        else:
            assert refusal(response)["field"] == field
    assert_still_serves(client)


def test_a_share_link_that_unpacks_to_gigabytes_is_not_unpacked(client: httpx.Client) -> None:
    error = refusal(client.get(f"/translate/c/{BOMB}/input_schema"))
    assert error["message"] == f"a config hash may have 4096 characters at most, got {len(BOMB)}"


@pytest.mark.parametrize(
    "path",
    [
        "%00",
        "assets/%00.js",
        "a" * 5000,
        "../" * 20 + "etc/passwd",
        "..%2f" * 20 + "etc%2fpasswd",
        "%2e%2e/%2e%2e/server.py",
        "%2Fetc%2Fpasswd",
        "%ff",
        "nothing.js",
        "assets",
    ],
)
@pytest.mark.parametrize("chain", ["translate", "chat"])
def test_a_playground_shows_no_file_but_its_own(client: httpx.Client, chain: str, path: str) -> None:
    """LangServe asks the file system for whatever it is given; a null byte or a long name was a 500."""
    response = client.get(f"/{chain}/playground/{path}")
    assert response.status_code == 404
    assert "root:" not in response.text
    assert_still_serves(client)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_million_mistakes_are_as_quick_to_refuse_as_one(client: httpx.Client, endpoint: str) -> None:
    """pydantic described every one of them before the first was reported, and nobody else was served meanwhile."""
    many = b"[" + b"1," * 140_000 + b"1]"
    contents = [
        Case("", None, input={"messages": "many"}, chain="chat", raw=(b'"many"', many)).content(endpoint),
        Case("", None, config="many", raw=(b'"many"', many)).content(endpoint),
        Case("", None, more={"kwargs": "many"}, raw=(b'"many"', many)).content(endpoint),
    ]
    for content in contents:
        response = client.post(f"/chat/{endpoint}", content=content)
        refusal(response)
        assert response.elapsed.total_seconds() < 1


@pytest.mark.parametrize("settings", [{"body_timeout_s": "0.5"}, {"idle_timeout_s": "0.5"}])
def test_a_body_that_does_not_come_is_not_waited_for_for_ever(tmp_path: Path, settings: dict[str, Any]) -> None:
    with (
        Server(tmp_path / "log", script="tests/scripted_server.py", **settings) as server,
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection,
    ):
        connection.sendall(b"POST /translate/invoke HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


LONG = "x" * 100_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"config": {"tags": [1] * 150_000}},
        {"config": {"tags": [1] * 1_000_000}},
        {"config": {LONG: 1}},
        {"config": {"configurable": {LONG: 1}}},
        {"config": {"configurable": dict.fromkeys(map(str, range(100_000)), 1)}},
        {"kwargs": [{}] * 150_000},
        {"include_names": [1] * 150_000},
        {"input": {"text": "Hi!", "target_language": "German", "source_language": LONG}},
        {"input": [[]] * 150_000},
    ],
    ids=range(9),
)
def test_what_is_large_and_wrong_is_refused_and_not_sent_back(scripted_server: Server, wrong: Any) -> None:
    """Each took the event loop for seconds, and some came back at twice their size."""
    content = json.dumps({"input": HELLO, **wrong})

    response = httpx.post(f"{scripted_server.url}/translate/stream_log", content=content, timeout=10)

    assert response.status_code in (400, 422)
    assert len(response.content) < 5_000


@pytest.mark.parametrize("wrong", ["[" * 1000 + "]" * 1000, '{"tags":' + "[" * 1000 + "]" * 1000 + "}"])
@pytest.mark.parametrize("path", ["invoke", "playground/"])
def test_a_share_link_that_is_deep_is_refused(scripted_server: Server, wrong: str, path: str) -> None:
    hashed = LZString.compressToEncodedURIComponent(wrong)  # type: ignore[no-untyped-call]
    method = "POST" if path == "invoke" else "GET"

    response = httpx.request(method, f"{scripted_server.url}/translate/c/{hashed}/{path}", json={"input": HELLO})

    assert response.status_code == 400
    assert response.json()["error"]["field"] == "config_hash"


def test_a_client_that_goes_away_while_it_sends_leaves_no_traceback(tmp_path: Path) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py") as server:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(b"POST /chat/invoke HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        time.sleep(0.5)
    assert "Traceback" not in server.log.read_text()
