"""From a request to the pieces of its answer, for both LangChain adapters. Knows engines; knows no LangChain."""

import time
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from llm.caller import Caller, current_caller
from llm.engine import Engine, Request
from llm.flow import wait_for_reader
from llm.generation import Chunk, Generation
from llm.sampling import Sampling


def build_request(ids: Sequence[int], sampling: Sampling, *, timeout_s: float | None, num_shared: int = 0) -> Request:
    """A request on behalf of the current caller."""
    caller = current_caller.get() or Caller()
    deadlines = [caller.deadline, None if timeout_s is None else time.monotonic() + timeout_s]
    return Request(
        prompt=tuple(ids),
        sampling=sampling,
        num_shared=num_shared,
        max_output_tokens=caller.max_output_tokens,
        deadline=min((deadline for deadline in deadlines if deadline is not None), default=None),
        owner=caller.owner,
        caller=caller.id,
        trace_id=caller.trace_id,
    )


def submit(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """Submit all at once, so that the engine can work on them together; all or none."""
    caller = current_caller.get()
    generations: list[Generation] = []
    try:
        for request in requests:
            generation = engine.generate(request)
            generations.append(generation)
            if caller is not None:
                caller.adopt(generation)
    except BaseException:
        for generation in generations:
            generation.cancel()
        raise
    return generations


def complete(engine: Engine, requests: Sequence[Request]) -> list[Chunk]:
    """The whole answers; if one fails, or nobody waits any more, the others are cancelled."""
    generations = submit(engine, requests)
    try:
        return [generation.whole() for generation in generations]
    finally:
        for generation in generations:
            generation.cancel()


async def acomplete(engine: Engine, requests: Sequence[Request]) -> list[Chunk]:
    """`complete`, awaited."""
    await wait_for_reader(min((request.deadline for request in requests if request.deadline is not None), default=None))
    generations = submit(engine, requests)
    try:
        return [await generation.awhole() for generation in generations]
    finally:
        for generation in generations:
            generation.cancel()


def stream(engine: Engine, request: Request) -> Generator[Chunk]:
    """The answer's chunks that say something; closing this cancels the generation."""
    (generation,) = submit(engine, [request])
    try:
        yield from filter(is_telling, generation)
    finally:
        generation.cancel()


async def astream(engine: Engine, request: Request) -> AsyncGenerator[Chunk]:
    """`stream`, awaited. Waits for who reads the events of the chain, if they are streamed."""
    await wait_for_reader(request.deadline)
    (generation,) = submit(engine, [request])
    try:
        async for chunk in generation:
            if is_telling(chunk):
                yield chunk
                await wait_for_reader(request.deadline)
    finally:
        generation.cancel()


def is_telling(chunk: Chunk) -> bool:
    """False while text is held back: half a character, or what may become a stop string."""
    return bool(chunk.text or chunk.logprobs or chunk.finish_reason)


def generation_info(chunk: Chunk, engine: Engine, model_name: str) -> dict[str, Any]:
    """What LangChain wants to know of a chunk besides its text; log-probabilities in OpenAI's shape."""
    info: dict[str, Any] = {}
    if chunk.finish_reason is not None:
        info |= {"finish_reason": str(chunk.finish_reason), "model_name": model_name}
    if chunk.stop_reason is not None:
        info["stop_reason"] = chunk.stop_reason
    if chunk.logprobs:
        spell = engine.checkpoint.tokenizer.convert_ids_to_tokens
        info["logprobs"] = {
            "content": [
                {
                    "token": spell(item.token_id),
                    "token_id": item.token_id,
                    "logprob": item.logprob,
                    "top_logprobs": [
                        {"token": spell(token_id), "token_id": token_id, "logprob": logprob}
                        for token_id, logprob in item.top
                    ],
                }
                for item in chunk.logprobs
            ]
        }
    return info
