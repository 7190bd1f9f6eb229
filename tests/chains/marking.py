"""A chat model for tests: it answers by a function of what it is shown, and notes every call.

A token is four characters.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import PrivateAttr

Answer = Callable[[str], str]

WORDS = 10
"""That come one by one."""


class MarkingModel(BaseChatModel):
    """Answers `answer(the last message)`, the first words one by one, and no more than `max_tokens`."""

    answer: Answer
    context: int = 4096
    stop_reason: str | None = None
    """What it tells of its end besides."""
    obeys: bool = True
    """Whether it ends at `max_tokens`."""
    delay_s: float = 0.0
    """Before each word."""
    _calls: list[list[BaseMessage]] = PrivateAttr(default_factory=list)
    _running: int = PrivateAttr(default=0)
    _most: int = PrivateAttr(default=0)

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        self.profile = ModelProfile(max_input_tokens=self.context)

    @property
    def calls(self) -> list[list[BaseMessage]]:
        """What it was shown, call by call."""
        return self._calls

    @property
    def shown(self) -> list[str]:
        """The last message of each call."""
        return [call[-1].text for call in self._calls]

    @property
    def most_at_once(self) -> int:
        """Calls that ran at the same time, at most."""
        return self._most

    @property
    def num_running(self) -> int:
        """Calls that run."""
        return self._running

    @property
    def _llm_type(self) -> str:
        return "marking"

    def get_token_ids(self, text: str) -> list[int]:
        return [0] * -(-len(text) // 4)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        self._running += 1
        self._most = max(self._most, self._running)
        try:
            for chunk in self._chunks(messages, kwargs):
                await asyncio.sleep(self.delay_s)
                yield chunk
        finally:
            self._running -= 1

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result([chunk async for chunk in self._astream(messages, stop, **kwargs)])

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        return self._result(list(self._chunks(messages, kwargs)))

    def _result(self, chunks: list[ChatGenerationChunk]) -> ChatResult:
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        message = whole.message
        assert isinstance(message, AIMessageChunk)
        answer = AIMessage(
            message.content, response_metadata=message.response_metadata, usage_metadata=message.usage_metadata
        )
        return ChatResult(generations=[ChatGeneration(message=answer)])

    def _chunks(self, messages: list[BaseMessage], options: dict[str, Any]) -> Iterator[ChatGenerationChunk]:
        self._calls.append(messages)
        text = self.answer(messages[-1].text)
        most = 4 * options["max_tokens"] if options.get("max_tokens") and self.obeys else len(text)
        finish_reason = "stop" if len(text) <= most else "length"
        text = text[:most]
        for word in re.findall(r"\S+\s*|\s+", text)[:WORDS]:
            yield self._chunk(word)
        if rest := "".join(re.findall(r"\S+\s*|\s+", text)[WORDS:]):
            yield self._chunk(rest)
        tokens = self.get_num_tokens(text)
        prompt = sum(self.get_num_tokens(message.text) for message in messages)
        usage = UsageMetadata(input_tokens=prompt, output_tokens=tokens, total_tokens=prompt + tokens)
        why = {"finish_reason": finish_reason, "stop_reason": self.stop_reason}
        yield self._chunk("", usage_metadata=usage, response_metadata=why)

    def _chunk(self, text: str, **more: Any) -> ChatGenerationChunk:
        return ChatGenerationChunk(message=AIMessageChunk(content=text, **more))
