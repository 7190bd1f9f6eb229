"""The server that forks a process for each file: what it costs, what it outlives, and what ends it."""

import asyncio
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import anyio
import psutil  # type: ignore[import-untyped]
import pytest

from chains.documents import files, reader_process
from chains.documents.files import FileReader
from chains.documents.reader_process import MAX_CRASHES, ReaderServer
from chains.errors import UnreadableFile
from tests.chains.documents.reader_scripts import Becomes, write_reader, written
from tests.files import making

ROOT = Path(__file__).parent.parent.parent.parent
SAMPLES = {
    "text": b"Here.",
    "html": b"<!doctype html><p>Here.",
    "docx": making.docx(["Here."]),
    "pdf": making.pdf(["Here."]),
}
WHO = "import os; tell(os.getpid(), os.getppid())"
WAITS = """
    import os, time
    with open({started!r}, "w") as file:
        file.write(f"{{os.getpid()}} {{os.getppid()}}\\n")
    from chains.documents import sandbox
    sandbox.restrict_by_seccomp = lambda: False
    sandbox.enter(max_memory=2**30, cpu_s=60.0)
    time.sleep(60)
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux are readers forked")


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Becomes]:
    becomes = Becomes(monkeypatch, tmp_path)
    yield becomes
    becomes.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ReaderServer]:
    """A server that reads files, and has read none."""
    server = ReaderServer(files.READER)
    monkeypatch.setattr(files, "SERVER", server)
    yield server
    server.close()


async def who() -> tuple[int, int]:
    """The process that reads the next file, and its server. The script is `WHO`."""
    pid, parent = json.loads((await FileReader().read(b"x")).text)
    return pid, parent


async def is_gone(pid: int) -> bool:
    """Whether a process ends within 10 s."""
    for _ in range(1_000):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        await asyncio.sleep(0.01)
    return False


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and of its children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def children() -> set[int]:
    return {each.pid for each in psutil.Process().children()}


async def test_files_are_read_by_processes_of_one_server(becomes: Becomes) -> None:
    becomes(WHO)
    found = [await who() for _ in range(3)]
    assert len({pid for pid, _ in found}) == 3
    assert len({parent for _, parent in found}) == 1
    assert found[0][1] != os.getpid()


async def test_a_tiny_file_costs_little_of_what_starting_a_process_costs(server: ReaderServer) -> None:
    before = children()
    await FileReader().read(b"x")
    (pid,) = children() - before
    process = psutil.Process(pid)
    start = cpu_s(process)
    for _ in range(20):
        await FileReader().read(b"x")
    assert (cpu_s(process) - start) / 20 < start / 4


def test_threads_and_event_loops_share_a_server(becomes: Becomes) -> None:
    becomes(WHO)
    found: list[tuple[int, int]] = []
    barrier = threading.Barrier(4)

    async def several() -> None:
        barrier.wait()
        found.extend(await asyncio.gather(*(who() for _ in range(4))))

    threads = [threading.Thread(target=lambda: asyncio.run(several())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({pid for pid, _ in found}) == 16
    assert len({parent for _, parent in found}) == 1


async def test_nothing_of_a_file_is_left_for_the_next(becomes: Becomes) -> None:
    becomes("import os; before = os.environ.get('seen'); os.environ['seen'] = '1'; tell(before)")
    assert [(await FileReader().read(b"x")).text for _ in range(2)] == ["[null]", "[null]"]


async def test_the_server_has_one_thread_and_leaks_no_descriptor(server: ReaderServer) -> None:
    before = children()
    await FileReader().read(b"x")
    (pid,) = children() - before
    process = psutil.Process(pid)
    num_descriptors = 6
    """Its socket, /dev/null twice, its selector, and the two ends that wake it."""
    for content in (*SAMPLES.values(), b"\0"):
        try:
            await FileReader().read(content)
        except UnreadableFile:
            continue
    assert (process.num_threads(), process.children()) == (1, [])
    for _ in range(1_000):
        # It closes the last control socket after it has reported the exit status.
        if process.num_fds() <= num_descriptors:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"{process.num_fds()} descriptors instead of {num_descriptors}")


async def test_a_file_in_flight_is_refused_when_the_server_dies_and_the_next_is_read(
    becomes: Becomes, tmp_path: Path
) -> None:
    becomes(WAITS.format(started=str(tmp_path / "started")))
    reading = asyncio.create_task(FileReader().read(b"x"))
    pid, parent = await written(tmp_path / "started")
    os.kill(parent, signal.SIGKILL)
    with pytest.raises(UnreadableFile, match="made its reader crash"):
        await reading
    assert await is_gone(pid)
    write_reader(becomes.servers[-1].script, WHO)
    assert (await who())[1] != parent


async def test_a_server_that_has_died_between_two_files_is_replaced(becomes: Becomes) -> None:
    becomes(WHO)
    _, parent = await who()
    os.kill(parent, signal.SIGKILL)
    assert await is_gone(parent)
    assert (await who())[1] != parent


async def test_a_server_that_cannot_fork_is_replaced(becomes: Becomes, tmp_path: Path) -> None:
    becomes(WHO)
    script = becomes.servers[-1].script
    works = script.read_text()
    script.write_text(f"import os\ndef fork():\n    raise BlockingIOError\nos.fork = fork\n{works}")
    with pytest.raises(UnreadableFile, match="made its reader crash"):
        await who()
    script.write_text(works)
    assert await who()


async def test_a_server_that_does_not_answer_is_killed(becomes: Becomes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_process, "KILL_TIMEOUT_S", 0.2)
    becomes(WHO)
    _, parent = await who()
    os.kill(parent, signal.SIGSTOP)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(FileReader().read(b"x"), 0.2)
    assert await is_gone(parent)
    assert (await who())[1] != parent


async def test_crashes_change_the_address_space_layout(becomes: Becomes) -> None:
    """All children of a server share it: who may guess without end finds it out."""
    becomes("import os, signal; os.read(0, 1) == b'!' and os.kill(os.getpid(), signal.SIGSEGV); " + WHO)
    servers = [(await who())[1]]
    for _ in range(MAX_CRASHES):
        assert (await who())[1] == servers[0]
        with pytest.raises(UnreadableFile, match="made its reader crash"):
            await FileReader().read(b"!")
    assert (await who())[1] != servers[0]


async def test_the_files_in_flight_are_read_when_the_server_is_replaced(becomes: Becomes, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    becomes(f"""
        import os, time
        with open({str(tmp_path / "started")!r}, "w") as file:
            file.write("1\\n")
        while not os.path.exists({str(go_on)!r}):
            time.sleep(0.01)
        tell("read")
    """)
    reading = asyncio.create_task(FileReader().read(b"x"))
    await written(tmp_path / "started")
    becomes.servers[-1].retire()
    go_on.touch()
    assert json.loads((await reading).text) == ["read"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signals_that_stop_a_service_leave_it_its_reader(becomes: Becomes, number: int) -> None:
    """systemd sends SIGTERM to all processes of a service, which may then finish its requests."""
    becomes(WHO)
    _, parent = await who()
    os.kill(parent, number)
    assert (await who())[1] == parent
    assert os.getpgid(parent) != os.getpgid(0)


async def test_all_end_with_the_service_even_if_that_is_killed(tmp_path: Path) -> None:
    script = write_reader(tmp_path / "reader.py", WAITS.format(started=str(tmp_path / "started")))
    service = f"""if True:
        import asyncio, sys
        from pathlib import Path
        from types import ModuleType
        chains = sys.modules["chains"] = ModuleType("chains")  # LangChain takes long to import
        chains.__path__ = ["chains"]
        from chains.documents import files
        from chains.documents.reader_process import ReaderServer
        files.SERVER = ReaderServer(Path({str(script)!r}))
        asyncio.run(files.FileReader().read(b"x"))
    """
    async with await anyio.open_process([sys.executable, "-c", service], cwd=ROOT) as process:
        pids = await written(tmp_path / "started")
        process.kill()
    assert [await is_gone(pid) for pid in pids] == [True, True]


def test_a_service_that_was_forked_has_a_server_of_its_own(becomes: Becomes) -> None:
    becomes(WHO)
    _, parent = asyncio.run(who())
    receiving, sending = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(sending, b"%d" % asyncio.run(who())[1])
        finally:
            os._exit(0)
    os.close(sending)
    with open(receiving, "rb") as answered:
        assert int(answered.read()) != parent
    os.waitpid(pid, 0)
    assert asyncio.run(who())[1] == parent


class TestStarted:
    """Where no process can be forked, one is started for each file."""

    @pytest.fixture(autouse=True)
    def cannot_fork(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(reader_process, "CAN_FORK", False)

    async def test_files_are_read(self) -> None:
        assert (await FileReader().read(SAMPLES["pdf"])).text == "Here."

    async def test_a_crash_is_a_refusal(self, becomes: Becomes) -> None:
        becomes("import os; os.abort()")
        with pytest.raises(UnreadableFile, match="made its reader crash"):
            await FileReader().read(b"x")

    async def test_cancelling_kills_the_process(self, becomes: Becomes, tmp_path: Path) -> None:
        becomes(WAITS.format(started=str(tmp_path / "started")))
        reading = asyncio.create_task(FileReader().read(b"x"))
        pid, parent = await written(tmp_path / "started")
        assert parent == os.getpid()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
