"""Four times what the service can take: whoever is let in is served as before, and the others hear at once."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.client import request
from tests.chaos.overload import QUEUE, SLOTS, TIMES, Figures, closed_loop, measure, open_loop
from tests.chaos.watch import idle
from tests.server import Server

LEAST_RATE = 3.0
REFUSALS = {"503 queue_full", "429 rate_limited", "429 too_many_at_once"}


@pytest.fixture(scope="module")
def small_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Four slots and two places to wait in."""
    log = tmp_path_factory.mktemp("small-server") / "log"
    with Server(log, script="tests/chaos/fragile_server.py", max_slots="4", max_queue="2") as server:
        yield server
    assert "Traceback" not in log.read_text()


def assert_served_or_told_to_come_back(figures: Figures) -> None:
    assert "whole" in figures.ends
    assert set(figures.ends) - {"whole"} <= REFUSALS
    for refusal in figures.refusals:
        assert refusal.is_whole
        assert int(refusal.headers["retry-after"]) >= 1
        assert set(refusal.problem) == {"type", "message", "request_id"}
        assert refusal.problem["request_id"] == refusal.headers["x-request-id"]


@pytest.mark.parametrize("endpoint", ["invoke", "stream"])
async def test_whoever_is_let_in_ends_whole_and_the_others_are_told_when_to_come_back(
    small_server: Server, endpoint: str
) -> None:
    messages = [
        request(
            f"/translate/{endpoint}", {"input": {"text": f"Number {number}: {'x' * 60}", "target_language": "German"}}
        )
        for number in range(1000)
    ]
    capacity = await closed_loop(small_server.port, messages, clients=6, seconds=1.5)
    assert_served_or_told_to_come_back(capacity)

    # A slow machine may not end a single one between the warm-up and the end.
    rate = TIMES * max(capacity.rate, LEAST_RATE)
    beyond = await open_loop(small_server.port, messages, rate=rate, seconds=2)

    assert_served_or_told_to_come_back(beyond)
    assert beyond.refusals
    await idle(small_server)


async def test_a_key_that_asks_for_too_much_is_told_so_and_another_is_let_in(tmp_path: Path) -> None:
    """Half of the places is the most that one key may have at once."""
    keys = {name: name * 20 for name in ("greedy", "modest")}
    said = {"text": f"Something that takes a while: {'x' * 60}", "target_language": "German"}
    messages = {name: [request("/translate/stream", {"input": said}, X_API_Key=keys[name])] * 1000 for name in keys}
    given = ",".join(f"{name}:{key}" for name, key in keys.items())
    with Server(
        tmp_path / "log", script="tests/chaos/fragile_server.py", max_slots="4", max_queue="2", api_keys=given
    ) as server:
        greedy, modest = await asyncio.gather(
            open_loop(server.port, messages["greedy"], rate=60, seconds=3),
            closed_loop(server.port, messages["modest"], clients=2, seconds=3),
        )

    assert set(greedy.ends) == {"whole", "429 too_many_at_once"}
    assert_served_or_told_to_come_back(greedy)
    assert set(modest.ends) == {"whole"}


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_at_four_times_capacity_those_inside_notice_little_and_refusals_are_quick(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Server(tmp_path / "log", max_slots=str(SLOTS), max_queue=str(QUEUE)) as server:
        measured = measure(server, seconds=60, repeats=3)

    with capsys.disabled():
        print(f"\n{measured}")
    for repeat in measured.repeats:
        for figures in (repeat.capacity, repeat.at_capacity, repeat.beyond):
            assert_served_or_told_to_come_back(figures)
    assert measured.first_token_ratio <= 2
    assert measured.refusal_p95_s <= 0.1
    assert measured.rate_ratio >= 0.95
    assert "Traceback" not in server.log.read_text()
