"""A hosted chain whose events are read slowly runs no further ahead of the reader than it may.

LangChain queues events without bound: one reader of 500 B/s made the process grow by 4 MB/s.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import Runnable, RunnableGenerator, RunnableLambda

from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from llm.caller import Caller, current_caller
from llm.errors import DeadlineExceeded, GenerationFailed
from llm.flow import MAX_AHEAD
from service.hosted import Hosted
from service.stream_log import LinearLog

ANSWER = "".join(chr(ord("a") + index % 26) for index in range(800))
TOKEN_S = 0.001


class Counter(AsyncCallbackHandler):
    """How many chunks a model has handed on, and whether it was stopped."""

    def __init__(self) -> None:
        self.num_chunks = 0
        self.error: BaseException | None = None

    async def on_llm_new_token(self, *args: Any, **kwargs: Any) -> None:
        self.num_chunks += 1

    async def on_llm_error(self, error: BaseException, **kwargs: Any) -> None:
        self.error = error


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(ANSWER, token_delay_s=TOKEN_S)
    engine.wait_until_ready(30)
    yield engine
    engine.close()


def chain_of(engine: ScriptedEngine) -> Runnable[Any, Any]:
    chain: Runnable[Any, Any] = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine)) | StrOutputParser()
    return chain.with_config(run_name="story")


def events_of(chain: Runnable[Any, Any], *callbacks: AsyncCallbackHandler, **filters: Any) -> AsyncGenerator[Any]:
    events: Any = chain.astream_events("Tell!", {"callbacks": [*callbacks]}, version="v2", **filters)
    return events  # type: ignore[no-any-return]


def outline(events: list[Any]) -> list[tuple[str, str]]:
    """Which events there were; those of chunks once, since what is ready at once is one chunk."""
    return list(dict.fromkeys((event["event"], event["name"]) for event in events))


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def until_paused(counter: Counter) -> None:
    await until(lambda: counter.num_chunks >= MAX_AHEAD)
    before = counter.num_chunks
    await asyncio.sleep(50 * TOKEN_S)
    assert counter.num_chunks == before


async def test_a_slow_reader_gets_everything_and_little_waits_for_it(engine: ScriptedEngine) -> None:
    chain, counter = chain_of(engine), Counter()
    events, num_read, most_unread = [], 0, 0
    async with aclosing(events_of(Hosted(bound=chain, chain="story"), counter)) as read:
        async for event in read:
            events.append(event)
            num_read += event["event"] == "on_chat_model_stream"
            await asyncio.sleep(0.005)
            most_unread = max(most_unread, counter.num_chunks - num_read)
    assert MAX_AHEAD / 2 < most_unread <= MAX_AHEAD + 1
    for kind, text in (
        ("on_chat_model_stream", lambda chunk: chunk.text),
        ("on_parser_stream", str),
        ("on_chain_stream", str),
    ):
        assert "".join(text(event["data"]["chunk"]) for event in events if event["event"] == kind) == ANSWER
    assert outline(events) == outline([event async for event in events_of(chain)])
    assert events[-1]["event"] == "on_chain_end"
    assert events[-1]["data"]["output"] == ANSWER


@pytest.mark.parametrize(
    ("filters", "names"),
    [
        ({"include_names": ["nothing"]}, set()),
        ({"include_types": ["chain"]}, {"story"}),
        ({"exclude_names": ["story", "ChatLLaMA3"]}, {"StrOutputParser"}),
        ({"exclude_types": ["chat_model", "parser"]}, {"story"}),
    ],
)
async def test_events_that_are_left_out_hold_nothing_up(
    engine: ScriptedEngine, filters: dict[str, Any], names: set[str]
) -> None:
    counter = Counter()
    hosted = Hosted(bound=chain_of(engine), chain="story")
    async with asyncio.timeout(20):
        read = {event["name"] async for event in events_of(hosted, counter, **filters)}
    assert read == names
    assert counter.num_chunks > MAX_AHEAD


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("endpoint", ["events", "log"])
async def test_a_step_without_a_model_waits_for_a_slow_reader_too(endpoint: str, linear: bool) -> None:
    num_pieces = 0

    async def endless(_: AsyncIterator[str]) -> AsyncIterator[str]:
        nonlocal num_pieces
        while True:
            num_pieces += 1
            yield "piece"

    chain: Runnable[Any, Any] = RunnableGenerator(endless)
    hosted: Runnable[Any, Any] = Hosted(bound=chain, chain="story")
    if linear:
        hosted = LinearLog(bound=hosted)
    read: Any = events_of(hosted) if endpoint == "events" else hosted.astream_log("Write!")
    num_read = 0
    async with aclosing(read), asyncio.timeout(20):
        async for _ in read:
            num_read += 1
            await asyncio.sleep(0.005)  # others run meanwhile
            assert num_pieces - num_read <= 2 * MAX_AHEAD
            if num_read > 3 * MAX_AHEAD:
                break
    assert num_pieces > 2 * MAX_AHEAD, "it went on when its reader had read"


@pytest.mark.parametrize("leave", ["closing", "cancelled while busy", "cancelled while waiting"])
async def test_who_leaves_ends_the_run(engine: ScriptedEngine, leave: str) -> None:
    others = asyncio.all_tasks()
    counter = Counter()

    async def read() -> None:
        async with aclosing(events_of(Hosted(bound=chain_of(engine), chain="story"), counter)) as events:
            async for event in events:
                if event["event"] == "on_chat_model_stream" and leave != "cancelled while waiting":
                    await until_paused(counter)
                    if leave == "closing":
                        return
                    await asyncio.sleep(3600)

    reader = asyncio.create_task(read())
    await until(lambda: counter.num_chunks > MAX_AHEAD // 2)
    if leave != "closing":
        if leave == "cancelled while busy":
            await until_paused(counter)
        reader.cancel()
    await asyncio.wait([reader], timeout=20)
    assert reader.cancelled() == (leave != "closing")
    await until(lambda: asyncio.all_tasks() == others)  # LangChain's generators are closed a moment later
    assert isinstance(counter.error, asyncio.CancelledError | GeneratorExit)
    await until(lambda: not engine.health().running)


async def test_an_error_comes_after_the_events_before_it() -> None:
    def answer(_: str) -> Iterator[str]:
        yield ANSWER
        raise LookupError("no weather")

    engine = ScriptedEngine(answer, token_delay_s=TOKEN_S)
    engine.wait_until_ready(30)
    others = asyncio.all_tasks()
    said = ""

    async def read() -> None:
        nonlocal said
        async with aclosing(events_of(Hosted(bound=chain_of(engine), chain="story"))) as events:
            async for event in events:
                if event["event"] == "on_parser_stream":
                    said += event["data"]["chunk"]
                    await asyncio.sleep(0.01)

    try:
        with pytest.raises(GenerationFailed):
            await read()
    finally:
        engine.close()
    assert said == ANSWER
    assert asyncio.all_tasks() == others


async def test_a_step_that_ends_with_cancelled_error_is_an_error_all_the_same(engine: ScriptedEngine) -> None:
    async def fail(_: str) -> str:
        raise asyncio.CancelledError

    hosted = Hosted(bound=chain_of(engine) | RunnableLambda(fail), chain="story")
    with pytest.raises(Exception, match="story"):
        _ = [event async for event in events_of(hosted)]


async def test_the_deadline_ends_a_run_that_waits_for_its_reader(engine: ScriptedEngine) -> None:
    counter = Counter()
    caller = Caller(deadline=time.monotonic() + 0.5)
    token = current_caller.set(caller)
    hosted = Hosted(bound=chain_of(engine), chain="story")

    async def read() -> None:
        async with aclosing(events_of(hosted, counter)) as events:
            async for event in events:
                if event["event"] == "on_chat_model_stream" and counter.error is None:
                    await until_paused(counter)
                    assert counter.error is None
                    await until(lambda: counter.error is not None)

    try:
        with pytest.raises(DeadlineExceeded):
            await read()
    finally:
        current_caller.reset(token)


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("is_linear", [False, True])
async def test_a_log_that_is_read_slowly_holds_its_run_up_too(engine: ScriptedEngine, is_linear: bool) -> None:
    counter = Counter()
    hosted = Hosted(bound=chain_of(engine), chain="story")
    logged: Any = LinearLog(bound=hosted) if is_linear else hosted
    said, most_unread, num_read = "", 0, 0
    async for patch in logged.astream_log("Tell!", {"callbacks": [counter]}):
        for operation in patch.ops:
            if operation["path"] == "/streamed_output/-":
                said += operation["value"]
                num_read += 1
                await asyncio.sleep(0.02)
        most_unread = max(most_unread, counter.num_chunks - num_read)
    assert said == ANSWER
    assert MAX_AHEAD / 2 < most_unread <= MAX_AHEAD + 1
