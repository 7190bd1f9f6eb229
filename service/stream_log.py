"""A log of runs that costs as much as there is to say.

LangChain's own says all of the output so far again with each piece of it: of a document of a few pages, hundreds of
megabytes. Nobody needs that who gets the pieces; but LangServe's chat playground reads nothing else.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from langchain_core.runnables import RunnableBinding, RunnableConfig
from langchain_core.tracers.log_stream import RunLogPatch

from chains.producing import added
from llm.flow import Flow


class _InPieces(RunnableBinding[Any, Any]):  # type: ignore[no-redef]  # its field is called kwargs
    """Streams pieces that cannot be added up, so that LangChain does not."""

    async def astream(self, input: Any, config: RunnableConfig | None = None, **arguments: Any) -> AsyncIterator[Any]:  # noqa: A002
        async with aclosing(super().astream(input, config, **arguments)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield {"piece": piece}


class LinearLog(RunnableBinding[Any, Any]):  # type: ignore[no-redef]
    """Another Runnable, the log of which has its output piece by piece, and whole at the end alone."""

    async def astream_log(  # type: ignore[override]
        self,
        input: Any,  # noqa: A002
        config: RunnableConfig | None = None,
        **arguments: Any,
    ) -> AsyncIterator[RunLogPatch]:
        """Yield patches, as `Runnable.astream_log` does with `diff`."""
        bound = _InPieces(
            bound=self.bound, kwargs=self.kwargs, config=self.config, config_factories=self.config_factories
        )
        pieces = []
        log: Any = bound.astream_log(input, config, **arguments)
        async with aclosing(Flow().read(log)) as patches:
            async for patch in patches:
                told = []
                for operation in patch.ops:
                    if operation["path"] == "/streamed_output/-":
                        told.append({**operation, "value": operation["value"]["piece"]})
                    elif operation["path"] == "/final_output":
                        pieces.append(operation["value"]["piece"])
                    else:
                        told.append(operation)
                if told:
                    yield RunLogPatch(*told)
        if pieces:
            try:
                whole = added(pieces)
            except TypeError:  # they cannot be added up: LangChain's own log has the last of them then
                whole = pieces[-1]
            yield RunLogPatch({"op": "replace", "path": "/final_output", "value": whole})
