import asyncio
import time

from tests.bench.load import Answer, drive, drive_http, read
from tests.bench.mix import mix
from tests.bench.peers import Ours, Weights
from tests.server import ROOT, Server


async def answered_in(seconds: float) -> Answer:
    started_s = time.perf_counter()
    await asyncio.sleep(seconds)
    return Answer(started_s, time.perf_counter())


async def test_each_client_asks_again_when_it_has_its_answer() -> None:
    running, most = 0, 0

    async def answer(seconds: float) -> Answer:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            return await answered_in(seconds)
        finally:
            running -= 1

    load = await drive([0.001] * 40, clients=4, limit_s=10, answer=answer)

    assert (most, len(load.answers)) == (4, 40)


async def test_it_counts_from_when_every_client_has_had_an_answer_until_nothing_is_left_to_ask() -> None:
    load = await drive([0.2, *[0.02] * 20, 0.2], clients=2, limit_s=10, answer=answered_in)

    first = min(load.answers, key=lambda answer: answer.started_s)
    last = max(load.answers, key=lambda answer: answer.started_s)
    assert load.open_s >= first.started_s + 0.2
    assert load.close_s < last.ended_s


async def test_when_the_time_is_up_nothing_more_is_asked_and_what_runs_is_waited_for() -> None:
    load = await drive([0.05] * 1000, clients=3, limit_s=0.2, answer=answered_in)

    assert 0.2 <= load.close_s - load.open_s < 1
    assert len(load.answers) < 100
    assert max(answer.started_s for answer in load.answers) <= load.close_s


def test_an_answer_that_breaks_off_is_an_error() -> None:
    whole = [(1.0, b'event: data\ndata: "a"\n\n'), (2.0, b"event: end\n\n")]

    assert read(0.0, 3.0, whole) == Answer(0.0, 3.0, ((1.0, "a"),))
    assert read(0.0, 3.0, whole[:1]).error == "the stream ended before the answer did"


def test_our_service_is_understood(scripted_server: Server) -> None:
    peer = Ours(Weights("embedded", ROOT, None, "cpu"))

    load = drive_http(scripted_server.url, [peer.call(ask) for ask in mix(8, run=0)], clients=2, limit_s=60)

    assert [answer.error for answer in load.answers] == [None] * 8
    assert all(answer.text for answer in load.answers)
    assert {answer.output_tokens for answer in load.answers} == {None, 64}  # only the chat says how many


def test_a_refusal_is_an_error_that_says_what_was_refused(scripted_server: Server) -> None:
    peer = Ours(Weights("embedded", ROOT, None, "cpu"))
    (call,) = (peer.call(ask) for ask in mix(1, run=0))

    load = drive_http(scripted_server.url, [type(call)(call.path, {"input": {}})] * 2, clients=1, limit_s=60)

    assert all(answer.error and answer.error.startswith("HTTP 422: ") for answer in load.answers)
