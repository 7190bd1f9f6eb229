"""What a chat model can take, in its own tokens. Knows LangChain's models by what they say of themselves."""

import sys
from collections.abc import Sequence

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.messages.utils import count_tokens_approximately

from chains.cancellable import checkpoint

UNKNOWN_CONTEXT = 4096
"""Tokens, for models that do not say."""

ANSWER_TOKENS = 1024
"""Kept free for an answer whose `max_tokens` is not given; a quarter of the context, where that is less."""

WINDOW = 65_536
"""Characters that are tokenized at once: a tokenizer takes hundreds of bytes of memory for each."""

FRAME = 64
"""Characters that templates write around a message, about."""


class Measure:
    """Counts tokens of one model. Each count is a checkpoint: work of a request ends there once it was cancelled."""

    def __init__(self, model: BaseChatModel) -> None:
        self._model = model
        # LangChain's own way to count for a model that has none is GPT-2's tokenizer from the hub.
        own = {way for way in WAYS if getattr(type(model), way) is not getattr(BaseChatModel, way)}
        has_ids = model.custom_get_token_ids is not None
        self._can_count = has_ids or bool(own - {"get_num_tokens_from_messages"})
        self._can_count_messages = has_ids or bool(own)

    def count(self, text: str) -> int:
        """Tokens of a text; of a model that cannot say, more than any tokenizer would make of ordinary text."""
        checkpoint()
        if self._can_count:
            return self._model.get_num_tokens(text)
        return len(text.encode(errors="replace")) // 2 + 1

    def count_messages(self, messages: Sequence[BaseMessage]) -> int:
        """Tokens of a prompt; of a model that cannot say, what LangChain takes for likely.

        A prompt of more than about `WINDOW` characters is counted piece by piece, as one count cannot be interrupted.
        The model's template then counts a few tokens too many for each message.
        """
        checkpoint()
        if not self._can_count_messages:
            return count_tokens_approximately(messages)
        if self._can_count and sum(len(message.text) + FRAME for message in messages) > WINDOW:
            frame = self.count_messages([HumanMessage("?")])
            return sum(frame + self.count_up_to(message.text, sys.maxsize) for message in messages)
        return self._model.get_num_tokens_from_messages(list(messages))

    def count_up_to(self, text: str, limit: int) -> int:
        """Tokens of a text, counted window by window until they are more than a limit."""
        num_tokens = 0
        for start in range(0, len(text), WINDOW):
            num_tokens += self.count(text[start : start + WINDOW])
            if num_tokens > limit:
                break
        return num_tokens

    def is_at_most(self, text: str, limit: int) -> bool:
        """Whether a text has at most so many tokens. A long one is not counted whole to say no."""
        return self.count_up_to(text, limit) <= limit

    @property
    def known_context(self) -> int | None:
        """Tokens of prompt and answer together, or None of a model that does not say."""
        if self._model.profile is None and self._can_count_messages:
            self.count_messages([HumanMessage("?")])  # a model of ours has its profile once it was used
        return (self._model.profile or {}).get("max_input_tokens")

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.known_context or UNKNOWN_CONTEXT

    def answer_tokens(self, max_tokens: int | None) -> int:
        """What is kept free for an answer: what callers ask for, or the model itself, or what answers mostly take."""
        own: int | None = getattr(self._model, "max_tokens", None)
        return max_tokens or own or min(ANSWER_TOKENS, self.context // 4)


WAYS = ("get_num_tokens_from_messages", "get_num_tokens", "get_token_ids")
