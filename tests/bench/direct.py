"""The same load on the engine itself, called in its own process: what the service's HTTP side costs, by comparison."""

import asyncio
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

from llm.engine import Engine, Request
from llm.errors import LLMError
from llm.local_engine import LocalEngine
from llm.prompt import encode
from llm.sampling import Sampling
from tests.bench.load import Answer, Load, drive
from tests.bench.mix import OPTIONS, Ask

Round = tuple[Sequence[Ask], int, float]
"""Asks, clients, seconds at most."""


def serve_rounds(reference: str, pipe: Connection) -> None:
    """Run in a process of its own: for each `Round` that comes through the pipe, send a `Load` back; None ends it."""
    engine = LocalEngine(reference)
    try:
        engine.wait_until_ready()
        pipe.send(None)
        while (asked := pipe.recv()) is not None:
            pipe.send(_round(engine, *asked))
    finally:
        engine.close()


def _round(engine: Engine, asks: Sequence[Ask], clients: int, limit_s: float) -> Load:
    tokenizer = engine.wait_until_ready().tokenizer
    sampling = Sampling.of(OPTIONS)
    requests = [
        Request(prompt=tuple(encode(tokenizer, ask.messages)), sampling=sampling, caller=str(number))
        for number, ask in enumerate(asks)
    ]
    return asyncio.run(drive(requests, clients=clients, limit_s=limit_s, answer=lambda request: _ask(engine, request)))


async def _ask(engine: Engine, request: Request) -> Answer:
    started_s = time.perf_counter()
    pieces: list[tuple[float, str]] = []
    usage = None
    try:
        async for chunk in engine.generate(request):
            pieces.append((time.perf_counter(), chunk.text))
            usage = chunk.usage or usage
    except LLMError as error:
        return Answer(started_s, time.perf_counter(), error=f"{type(error).__name__}: {error}")
    return Answer(
        started_s,
        time.perf_counter(),
        tuple((arrived_s, text) for arrived_s, text in pieces if text),
        len(request.prompt),
        usage.completion_tokens if usage else None,
    )
