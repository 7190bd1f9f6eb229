"""Conversations that outgrow the context, over HTTP: old turns go, or the request is refused."""

import json
import re
from typing import Any

import pytest

from tests.server import Server
from tests.wire.asking import ENDPOINTS, ask, at, error_of

SYSTEM = ["system", "You know the sea."]
TURNS = [[role, f"{role} {number} {'of the boats ' * 20}"] for number in range(100) for role in ("human", "ai")]
LONG = {"messages": [SYSTEM, *TURNS, ["human", "And now?"]]}


def left_out(found: Any) -> list[int]:
    """Every number of messages left out that stands anywhere in an answer."""
    if isinstance(found, dict):
        here = [found["messages_left_out"]] if "messages_left_out" in found else []
        return here + [number for value in found.values() for number in left_out(value)]
    return [number for value in found for number in left_out(value)] if isinstance(found, list) else []


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_old_turns_are_left_out_and_the_answer_says_how_many(scripted_server: Server, endpoint: str) -> None:
    response = ask(scripted_server, f"chat/{endpoint}", LONG)
    assert response.status_code == 200, response.text[:300]
    if endpoint in ("invoke", "batch"):
        said = [response.json()["output"]]
    else:
        lines = response.text.splitlines()
        said = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    numbers = left_out(said)
    assert numbers
    (number,) = set(numbers)
    assert 0 < number < len(TURNS)
    assert number % 2 == 0, "whole turns go"
    if endpoint == "stream":
        assert "".join(each.get("content", "") for each in said) == "And now?"
    else:
        assert "And now?" in response.text


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_who_wants_an_error_gets_one_with_the_numbers(scripted_server: Server, endpoint: str) -> None:
    error = error_of(ask(scripted_server, f"chat/{endpoint}", LONG, on_overflow="error"), 422, "context_overflow")
    assert error["field"] == at(endpoint)
    assert re.fullmatch(
        r"input.*: the prompt has \d+ tokens; the context holds 8192, the answer included", error["message"]
    )


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("on_overflow", "counted"), [("trim", 30_022), ("error", 85_602)])
def test_a_message_that_cannot_fit_alone_is_refused_either_way(
    scripted_server: Server, endpoint: str, on_overflow: str, counted: int
) -> None:
    alone = {"messages": [*TURNS, ["human", "boats " * 5000]]}
    response = ask(scripted_server, f"chat/{endpoint}", alone, on_overflow=on_overflow)
    error = error_of(response, 422, "context_overflow")
    assert error["field"] == at(endpoint)
    assert f"the prompt has {counted} tokens; the context holds 8192" in error["message"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize(("option", "value"), [("on_overflow", "drop"), ("system_prompt", "x" * 10_001)])
def test_options_have_bounds(scripted_server: Server, endpoint: str, option: str, value: str) -> None:
    response = ask(scripted_server, f"chat/{endpoint}", {"messages": [["human", "Hi!"]]}, **{option: value})
    assert response.status_code == 422
    assert option in response.json()["error"]["field"]
