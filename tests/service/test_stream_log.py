"""The log of runs is the one that LangChain writes, but for what is said again and again."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.runnables import RunnableConfig, RunnableGenerator, RunnableLambda
from langchain_core.runnables.utils import AddableDict
from langchain_core.tracers.log_stream import RunLogPatch

from service.stream_log import LinearLog

PIECES: dict[str, list[Any]] = {
    "texts": ["It ", "", "rained."],
    "messages": [AIMessageChunk(content="It "), AIMessageChunk(content="rained.")],
    "dicts that can be added up": [
        AddableDict(text="a"),
        AddableDict(segments=[{"index": 0}]),
        AddableDict(text="b"),
        AddableDict(segments=[{"index": 1}]),
    ],
    "dicts that cannot": [{"text": "a"}, {"text": "b"}],
    "numbers": [1, 2, 3],
    "one": ["It rained."],
    "one empty": [""],
    "none": [],
}


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
@pytest.mark.parametrize("name", PIECES)
async def test_what_readers_put_together_is_the_same(name: str) -> None:
    async def stream(_: AsyncIterator[Any], config: RunnableConfig) -> AsyncIterator[Any]:
        for piece in PIECES[name]:
            await RunnableLambda(lambda said: said, name="part").ainvoke(str(piece), config)
            yield piece

    stream_with_config: Any = stream
    chain: RunnableGenerator[Any, Any] = RunnableGenerator(stream_with_config, name="story")
    states = []
    for logged in (chain, LinearLog(bound=chain)):
        whole = RunLogPatch()
        async for patch in logged.astream_log("Tell!"):
            whole = whole + patch
        states.append(whole.state if hasattr(whole, "state") else None)
    theirs, ours = states
    assert theirs is not None
    assert ours is not None
    assert ours["streamed_output"] == theirs["streamed_output"] == PIECES[name]
    assert ours["final_output"] == theirs["final_output"]
    assert ours["logs"].keys() == theirs["logs"].keys()
    assert ours["name"] == theirs["name"] == "story"


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
async def test_an_error_comes_after_the_pieces_before_it() -> None:
    async def stream(_: AsyncIterator[Any]) -> AsyncIterator[str]:
        yield "It "
        raise LookupError("no weather")

    said: list[str] = []

    async def read() -> None:
        async for patch in LinearLog(bound=RunnableGenerator(stream)).astream_log("Tell!"):
            said.extend(operation["value"] for operation in patch.ops if operation["path"] == "/streamed_output/-")

    with pytest.raises(LookupError, match="no weather"):
        await read()
    assert said == ["It "]
