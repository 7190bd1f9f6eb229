"""A hosted chain whose own failures have a type that callers see. Knows LangChain, and no HTTP server."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any, cast

from langchain_core.runnables import Runnable, RunnableBinding, RunnableConfig
from langchain_core.runnables.schema import StreamEvent
from langchain_core.tracers.log_stream import RunLogPatch

from chains.cancellable import WorkCancelled
from llm.caller import current_caller
from llm.flow import CHAIN, Flow, wait_for_reader
from service.errors import INTERNAL, ChainFailed, describe


class Hosted(RunnableBinding[Any, Any]):  # type: ignore[no-redef]  # its field is called kwargs
    """Another Runnable, with `ChainFailed` in place of whatever its steps raise that callers have no name for.

    It has no run of its own: the names of runs in logs and events stay as they are. Only what LangServe calls is here.
    """

    chain: str = ""
    """Its name."""

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **arguments: Any) -> Any:  # noqa: A002
        """`Runnable.ainvoke`."""
        with failures_of(self.chain):
            return await super().ainvoke(input, config, **arguments)

    async def abatch(
        self,
        inputs: Sequence[Any],
        config: RunnableConfig | list[RunnableConfig] | None = None,
        **arguments: Any,
    ) -> list[Any]:
        """`Runnable.abatch`."""
        with failures_of(self.chain):
            return await super().abatch(list(inputs), config, **arguments)

    async def astream(
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **arguments: Any,
    ) -> AsyncIterator[Any]:
        """`Runnable.astream`; LangChain's `astream_log` and `astream_events` call it too, and take all it has."""
        caller = current_caller.get()
        deadline = None if caller is None else caller.deadline
        with failures_of(self.chain):
            async with aclosing(super().astream(input, config, **arguments)) as pieces:  # type: ignore[type-var]
                async for piece in pieces:
                    yield piece
                    await wait_for_reader(deadline, CHAIN)

    async def astream_log(  # type: ignore[override]
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **arguments: Any,
    ) -> AsyncIterator[RunLogPatch]:
        """`Runnable.astream_log` with `diff`."""
        log: Any = super().astream_log(input, config, **arguments)
        async with aclosing(Flow().read(log)) as patches:
            async for patch in patches:
                yield patch

    async def astream_events(  # type: ignore[override]
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **arguments: Any,
    ) -> AsyncIterator[StreamEvent]:
        """`Runnable.astream_events`. LangChain (1.7) ends it as if all were well after a `CancelledError`."""
        running: set[str] = set()  # the outermost run, until it has ended
        with failures_of(self.chain):
            # Not super()'s, which would stream the chain inside past `astream` above.
            whole: Any = Runnable.astream_events(self, input, config, **arguments)
            async with aclosing(Flow().read(whole)) as events:
                async for event in events:
                    if event.get("parent_ids") == [] and event["event"].endswith("_start"):
                        running.add(event["run_id"])
                    elif event["event"].endswith("_end"):
                        running.discard(event["run_id"])
                    yield without_exception(event)
            if running:
                raise asyncio.CancelledError


def without_exception(event: StreamEvent) -> StreamEvent:
    """The event, with the type's name for the exception in it: LangServe has no JSON for exceptions."""
    error: Any = event["data"].get("error")
    if not isinstance(error, BaseException):
        return event
    data: Any = {**event["data"], "error": type(error).__name__}
    changed: Any = {**event, "data": data}
    return cast(StreamEvent, changed)


@contextmanager
def failures_of(chain: str) -> Iterator[None]:
    """Raise `ChainFailed` for what is raised inside, unless it has a type for callers, or is the request's end."""
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ChainFailed(chain, error) from error  # the request was not cancelled: a step raised this
    except (GeneratorExit, KeyboardInterrupt, SystemExit, WorkCancelled):
        raise
    except BaseException as error:  # a library's own may be no Exception, and LangServe and Starlette pass it on
        if describe(error) is not INTERNAL:
            raise
        raise ChainFailed(chain, error) from error
