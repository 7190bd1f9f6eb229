"""Clients that ask and do not read what they get: they are cut, and nobody else notices."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from tests.chaos.client import ask, request
from tests.chaos.stalling import BUFFER, LONG, SMALL_BUFFERS, STALLED, stalled
from tests.chaos.watch import assert_all_slots_are_free, few_fds, get, health, held, idle, until
from tests.server import Server

SLOTS = 16
IDLE_TIMEOUT_S = 1


@pytest.fixture(scope="module")
def impatient_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("impatient-server") / "log"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_BUFFERS.items():
            patch.setenv(name, value)
        server = Server(
            log,
            script="tests/chaos/fragile_server.py",
            max_slots=str(SLOTS),
            max_output_tokens="8000",
            idle_timeout_s=str(IDLE_TIMEOUT_S),
        )
        with server:
            yield server
    assert "Traceback" not in log.read_text()


@pytest.mark.parametrize("pause_s", [None, 1.0], ids=["nothing", "a byte a second"])
async def test_who_reads_too_little_is_cut_while_others_are_served(
    impatient_server: Server, pause_s: float | None
) -> None:
    hello = {"input": {"text": "Good morning, all of you! " * 10, "target_language": "German"}}
    await asyncio.gather(*(ask(impatient_server.port, request("/translate/stream", hello)) for _ in range(SLOTS)))
    before = held(impatient_server)

    async with stalled(impatient_server, pause_s=pause_s):
        await until(impatient_server, within_s=5, running=STALLED)
        others = await asyncio.gather(
            *(ask(impatient_server.port, request("/translate/stream", hello)) for _ in range(SLOTS))
        )
        # Sooner by far than their answers would have ended by themselves.
        await idle(impatient_server, within_s=IDLE_TIMEOUT_S + 5)
        await few_fds(impatient_server, before.fds)

    assert {other.label for other in others} == {"whole"}
    assert held(impatient_server).rss_mib - before.rss_mib < 32
    await assert_all_slots_are_free(impatient_server, LONG, SLOTS)


async def test_who_reads_after_a_pause_that_is_not_too_long_gets_everything(impatient_server: Server) -> None:
    asked = request("/chat/stream", {"input": {"messages": [["user", "y" * 1500]]}})
    loop = asyncio.get_running_loop()
    said = bytearray()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        connection.setblocking(False)
        await loop.sock_connect(connection, ("127.0.0.1", impatient_server.port))
        await loop.sock_sendall(connection, asked)
        await asyncio.sleep(IDLE_TIMEOUT_S / 2)
        while piece := await loop.sock_recv(connection, 64 * 1024):
            said += piece

    assert said.count(b'"content":"y') > 1
    assert said.endswith(b"event: end\r\n\r\n\r\n0\r\n\r\n")


@pytest.mark.soak
@pytest.mark.timeout(600)
async def test_two_hundred_stalled_readers_cost_the_service_little(
    impatient_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = held(impatient_server)
    figures = []
    for _ in range(24):
        async with stalled(impatient_server, pause_s=None):
            await until(impatient_server, within_s=5, running=STALLED)
            await asyncio.sleep(IDLE_TIMEOUT_S / 2)
            figures.append(held(impatient_server))
            await idle(impatient_server, within_s=IDLE_TIMEOUT_S + 5)
    await few_fds(impatient_server, before.fds)
    after = held(impatient_server)

    with capsys.disabled():
        print(f"\n{before} before, {max(figures, key=lambda each: each.rss_mib)} at most, {after} after")
    settled, *later = figures[len(figures) // 2 :]  # at first the process takes memory that it then uses again
    assert max(each.rss_mib for each in later) - settled.rss_mib < 8
    assert (await health(impatient_server))["state"] == "ready"
    assert (await get(impatient_server, "/ready")).status == 200
