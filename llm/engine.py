"""The seam between the adapters and whatever generates: ids in, a `Generation` out. Knows no torch and no LangChain."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from llm.checkpoint import Checkpoint
from llm.errors import ContextOverflow, InvalidOption
from llm.generation import Generation
from llm.sampling import Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What an engine is asked for."""

    prompt: tuple[int, ...]
    """Token ids."""
    sampling: Sampling
    max_output_tokens: int | None = None
    """Tokens of the answer at most, whatever its sampling says: the service's own limit."""
    deadline: float | None = None
    """`time.monotonic()` seconds after which the request ends, wherever it is."""
    owner: str = ""
    """Requests of one owner may share computed prefixes."""
    num_shared: int = 0
    """Leading prompt tokens that are nobody's secret: the chain's own prompt. They may be reused between owners."""
    caller: str = ""
    """One HTTP request, however many generations it submits: turns go round between callers. Empty: a caller of its
    own."""
    trace_id: str = ""


class EngineState(StrEnum):
    """What can be expected of an engine."""

    LOADING = "loading"
    READY = "ready"
    DEGRADED = "degraded"
    """It works, but something went wrong, and no request was finished since."""
    DEAD = "dead"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineHealth:
    """A look at an engine."""

    state: EngineState
    model: str
    """The model reference that it was started with."""
    running: int = 0
    """Requests that have a slot."""
    waiting: int = 0
    """Requests in the queue, those among them that had to give up a slot."""
    slots: int = 0
    """Requests that can run at once."""
    context: int = 0
    """Tokens of prompt and answer together, at most."""
    prompt_tokens: int = 0
    """Tokens of all prompts that were read, since the start."""
    cached_tokens: int = 0
    """How many of these did not have to be computed."""
    memory_use: float = 0.0
    """From 0 to 1: the part of the memory for keys and values that running requests hold."""
    preemptions: int = 0
    """How often a request had to give up its slot or its memory to another, since the start."""
    restarts: int = 0
    """How often the engine's loop has failed and started again."""
    error: str | None = None
    """What killed or degraded it."""


class Engine(Protocol):
    """Anything that turns token ids into text. Ready to use from any thread and any event loop."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Names, ids and limits of the model. Raises `EngineLoading` or `EngineDead` while there is none."""
        ...

    def wait_until_ready(self, timeout_s: float | None = None) -> Checkpoint:
        """Wait for the model. Raises what kept it from loading, or `EngineLoading` after a timeout."""
        ...

    def generate(self, request: Request) -> Generation:
        """Admit a request and return at once, or raise a typed error: `InvalidOption`, `ContextOverflow`, or an
        `EngineError`."""
        ...

    def health(self) -> EngineHealth:
        """A look at the engine; cheap."""
        ...

    def close(self) -> None:
        """End everything that runs or waits, and free the model."""
        ...


def check_limits(request: Request, checkpoint: Checkpoint) -> int:
    """Hold a request against the model's limits; return how many tokens it may generate at most.

    Raises `ContextOverflow` and `InvalidOption`.
    """
    num_prompt, sampling = len(request.prompt), request.sampling
    if num_prompt == 0:
        raise InvalidOption("prompt", "at least one token", num_prompt)
    if not 0 <= min(request.prompt) <= max(request.prompt) < checkpoint.vocab_size:
        # In a step, it would take the others with it.
        wrong = next(token_id for token_id in request.prompt if not 0 <= token_id < checkpoint.vocab_size)
        raise InvalidOption("prompt", f"token ids from 0 to {checkpoint.vocab_size - 1}", wrong)
    if not 0 <= request.num_shared <= num_prompt:
        raise InvalidOption("num_shared", f"between 0 and {num_prompt}, the prompt's tokens", request.num_shared)
    if sampling.top_k > checkpoint.vocab_size:
        raise InvalidOption("top_k", f"at most {checkpoint.vocab_size}, the size of the vocabulary", sampling.top_k)
    limit = request.max_output_tokens
    if limit is not None and limit < 1:
        raise InvalidOption("max_output_tokens", "at least 1", limit)
    room = checkpoint.context - num_prompt
    if room < 1:
        raise ContextOverflow(prompt=num_prompt, context=checkpoint.context)
    if sampling.max_tokens is not None and sampling.max_tokens > room:
        raise ContextOverflow(prompt=num_prompt, context=checkpoint.context, max_tokens=sampling.max_tokens)
    return min(most for most in (room, sampling.max_tokens, limit) if most is not None)
