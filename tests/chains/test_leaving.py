"""Who leaves a long document leaves nothing behind: the engine's slots are free within one step."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel, FakeListChatModel

from chains import brief, summarize, translate
from chains.cancellable import WorkCancelled, run_cancellable
from chains.chain import Chain
from chains.segments import segments
from chains.translate import AT_ONCE
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from llm.scripted_engine import ScriptRunner

STEP_S = 0.2
LONG = "\n\n".join(f"Paragraph {number} tells of the sea. " * 20 for number in range(100))


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine("Das Meer ist weit. " * 50, token_delay_s=STEP_S, max_slots=64)
    engine.wait_until_ready()
    yield engine
    engine.close()


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many were in each step."""
    steps: list[int] = []
    decode = ScriptRunner.decode

    def counted(runner: ScriptRunner, sequences: list[Any]) -> list[Any]:
        steps.append(len(sequences))
        return decode(runner, sequences)

    monkeypatch.setattr(ScriptRunner, "decode", counted)
    return steps


@pytest.mark.parametrize("build", [translate.build, translate.build_document, summarize.build, brief.build])
async def test_who_leaves_frees_all_slots_within_one_step(
    engine: ScriptedEngine, steps: list[int], build: Callable[[BaseChatModel], Chain]
) -> None:
    chain = build(ChatLLaMA3(llm=LLaMA3_LLM(engine=engine)))
    asked = {"text": LONG} if build is summarize.build else {"text": LONG, "target_language": "German"}

    async def read() -> None:
        async with aclosing(chain.runnable.astream(asked)) as pieces:  # type: ignore[type-var]
            async for _ in pieces:
                pass

    reader = asyncio.create_task(read())
    async with asyncio.timeout(60):
        while not steps or steps[-1] < AT_ONCE:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    before = len(steps)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    async with asyncio.timeout(60):
        while engine.health().running:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert len(steps) <= before + 1
    await asyncio.sleep(3 * STEP_S)
    assert len(steps) <= before + 1, "nothing else was begun"
    assert engine.health().waiting == 0


@pytest.mark.parametrize("build", [translate.build, translate.build_document, summarize.build, brief.build])
@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_long_text_is_not_counted_any_further_for_who_left(
    build: Callable[[BaseChatModel], Chain], is_streamed: bool
) -> None:
    """It went on in asyncio's default executor: 18 s for a summary of 10 MB."""
    num_counts = 0
    is_counting = threading.Event()

    def count(text: str) -> list[int]:
        nonlocal num_counts
        num_counts += 1
        if num_counts > NUM_COUNTS:
            is_counting.set()
        return [0] * (len(text) // 4 + 1)

    model = FakeListChatModel(responses=["So be it."], custom_get_token_ids=count, sleep=3600)
    asked = {"text": "So it goes on and on. " * 100_000}
    if build is not summarize.build:
        asked["target_language"] = "German"
    runnable = build(model).runnable

    async def read() -> None:
        if is_streamed:
            async for _ in runnable.astream(asked):
                pass
        else:
            await runnable.ainvoke(asked)

    reader = asyncio.create_task(read())
    assert await asyncio.to_thread(is_counting.wait, 60)
    reader.cancel()
    await asyncio.wait([reader])
    before, counted = num_counts, -1
    while counted < num_counts:  # until nothing more is counted
        counted = num_counts
        await asyncio.sleep(0.05)
    assert num_counts - before <= MOST_COUNTS


NUM_COUNTS = 30
"""Counts after which who asked leaves: the text is being split."""

MOST_COUNTS = 3
"""Counts after that: the one in progress, and what two threads may begin before they see it."""


@pytest.mark.parametrize(
    "unit", ["- 1\n", "<div>\n\n", "> 1\n", "***\n", "1\n\n", "| 1 | 2 |\n|---|---|\n| 3 | 4 |\n\n", "<!-- -->\n\n"]
)
async def test_preparing_a_text_without_words_ends_with_its_request(unit: str) -> None:
    """Tokens are counted of words alone, and each count was a checkpoint: without words there was none."""
    ended: list[type[BaseException] | None] = []
    is_over = threading.Event()

    def prepare() -> None:
        try:
            next(segments(unit * (400_000 // len(unit)), budget=100, count=len))
            ended.append(None)
        except BaseException as error:
            ended.append(type(error))
            raise
        finally:
            is_over.set()

    task = asyncio.create_task(run_cancellable(prepare))
    await asyncio.sleep(0.05)
    task.cancel()
    assert await asyncio.to_thread(is_over.wait, 30)
    assert ended == [WorkCancelled]
