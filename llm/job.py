"""One request on its way through an engine, and what becomes of its tokens. Knows no queue and no model."""

import math
from collections.abc import Hashable
from typing import Generic

from llm.checkpoint import Checkpoint
from llm.engine import Request, check_limits
from llm.generation import Chunk, FinishReason, Generation, Token, Usage
from llm.runner import S
from llm.text import TextStream


class Job(Generic[S]):
    """A request, its answer, and how far it has come."""

    def __init__(self, request: Request, checkpoint: Checkpoint, generation: Generation, number: int) -> None:
        """Begin. Raises `ContextOverflow` and `InvalidOption` if the model's limits do not allow it."""
        self.request = request
        self.generation = generation
        self.number = number
        """Requests are numbered as they come."""
        self.caller: Hashable = request.caller or generation  # nobody's requests have nothing to do with each other
        self.deadline = math.inf if request.deadline is None else request.deadline
        self.sequence: S | None = None  # opened when its turn comes
        self.turn = 0
        """A number that grows: of the moment when it got its slot, or last read a piece of its prompt."""
        self.num_tokens = 0
        """Tokens of the answer so far."""
        self._max_tokens = check_limits(request, checkpoint)
        self._stop_ids = checkpoint.stop_ids
        self._text = TextStream(checkpoint.tokenizer, request.sampling.stop)

    def take(self, token: Token, *, num_cached: int) -> Chunk:
        """What a new token adds to the answer, and whether it ends it."""
        self.num_tokens += 1
        finish_reason = None
        text = ""
        if token.id in self._stop_ids:
            finish_reason = FinishReason.STOP
        else:
            text = self._text.push((token.id,))
            if self._text.stopped_at is not None:
                finish_reason = FinishReason.STOP
            elif self.num_tokens == self._max_tokens:
                finish_reason = FinishReason.LENGTH
        return Chunk(
            text=text + self._text.flush() if finish_reason else text,
            token_ids=(token.id,),
            logprobs=() if token.logprob is None else (token.logprob,),
            finish_reason=finish_reason,
            usage=Usage(len(self.request.prompt), self.num_tokens, num_cached) if finish_reason else None,
            stop_reason=self._text.stopped_at,
        )
