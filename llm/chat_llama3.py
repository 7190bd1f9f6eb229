"""`ChatLLaMA3`: a local Llama 3 as a LangChain chat model, messages in and an AIMessage out. Knows no HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, ModelProfile
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.messages.ai import InputTokenDetails, UsageMetadata
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import SecretStr

from llm.answering import acomplete, astream, build_request, complete, generation_info, stream
from llm.checkpoint import Checkpoint
from llm.engine import Request, check_limits
from llm.errors import ContextOverflow, EngineError, InvalidMessage
from llm.generation import Chunk, Usage
from llm.llama3_llm import LLaMA3_LLM
from llm.prompt import count, count_shared, encode, encode_text
from llm.sampling import Sampling, options_of


class ChatLLaMA3(BaseChatModel):
    """A local Llama 3 for LangChain's chat chains.

    Sampling options come from, first found: the call's arguments, this model's fields, fields that were set on `llm`,
    the checkpoint's own `generation_config.json`, and `llm`'s defaults where the checkpoint has none.

    `profile` is there once the model has loaded: at construction, or else at the first use.
    """

    llm: LLaMA3_LLM
    """The model; its engine may serve any number of others too."""
    max_tokens: int | None = None
    """New tokens at most; None: what room is left in the context."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    """Seconds that a call may take, waiting included."""
    streaming: bool = False
    """Make `invoke` go through `stream`, so that callbacks see each token."""
    max_retries: int | None = None
    """As chat models of hosted providers have it. No network lies between: nothing is retried."""
    api_key: SecretStr | None = None
    """As chat models of hosted providers have it. A local model needs none."""

    def __init__(self, **fields: Any) -> None:
        """Wrap a loaded model.

        Args:
            fields: `llm`, sampling defaults, and what every LangChain model takes (`callbacks`, `tags`, …).

        Raises:
            InvalidOption: A sampling default is out of its bounds.
        """
        if unknown := fields.keys() - type(self).model_fields.keys():
            raise TypeError(f"ChatLLaMA3 takes no argument {', '.join(sorted(unknown))}")
        super().__init__(**fields)
        Sampling.of({**options_of(self), "stop": self.stop or None})  # refuses defaults that no call could use

    @property
    def model_name(self) -> str:
        """The model reference."""
        return self.llm.model_name

    @property
    def _llm_type(self) -> str:
        return "llama3-chat"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model_name": self.model_name, **options_of(self.llm), **options_of(self)}

    def _resolve_model_profile(self) -> ModelProfile | None:
        try:
            context = self.llm.engine.checkpoint.context
        except EngineError:  # still loading
            return None
        return ModelProfile(
            name=self.model_name,
            open_weights=True,
            max_input_tokens=context,
            max_output_tokens=context,
            text_inputs=True,
            text_outputs=True,
            image_inputs=False,
            audio_inputs=False,
            video_inputs=False,
            pdf_inputs=False,
            tool_calling=False,
            structured_output=False,
        )

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text alone, without template; special tokens in it are plain text."""
        return encode_text(self._loaded().tokenizer, text)

    def get_num_tokens_from_messages(
        self, messages: Sequence[BaseMessage], tools: Sequence[Any] | None = None, **kwargs: Any
    ) -> int:
        """Prompt tokens of a conversation, template and the answer's header included."""
        if tools:
            raise NotImplementedError("tools are not supported")
        return count(self._loaded().tokenizer, messages)

    def check(self, messages: Sequence[BaseMessage], stop: list[str] | None = None, **options: Any) -> int:
        """Hold a call against the model's limits without making it; return the number of prompt tokens.

        Raises what the call would raise: `InvalidOption`, `InvalidMessage`, `ContextOverflow`, or an `EngineError`
        while there is no model.
        """
        request = self._request(messages, stop, options)
        check_limits(request, self._loaded())
        return len(request.prompt)

    def _loaded(self) -> Checkpoint:
        checkpoint = self.llm.engine.checkpoint
        if self.profile is None:
            self.profile = self._resolve_model_profile()
        return checkpoint

    def _request(self, messages: Sequence[BaseMessage], stop: list[str] | None, options: Mapping[str, Any]) -> Request:
        checkpoint = self._loaded()
        llm = self.llm
        set_on_llm = {name: value for name, value in options_of(llm).items() if name in llm.model_fields_set}
        defaults: Mapping[str, Any] = checkpoint.defaults or {**options_of(llm), "max_tokens": None}
        given = {name: value for name, value in {**options, "stop": stop}.items() if value is not None}
        sampling = Sampling.of({**defaults, **set_on_llm, **options_of(self), **given})
        timeout_s = llm.timeout if self.timeout is None else self.timeout
        _refuse_far_too_long(messages, checkpoint)
        ids = encode(checkpoint.tokenizer, messages)
        num_shared = count_shared(checkpoint.tokenizer, messages, ids)
        return build_request(ids, sampling, timeout_s=timeout_s, num_shared=num_shared)

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        (answer,) = complete(self.llm.engine, [self._request(messages, stop, kwargs)])
        return self._result(answer)

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        request = await asyncio.to_thread(self._request, messages, stop, kwargs)
        (answer,) = await acomplete(self.llm.engine, [request])
        return self._result(answer)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with closing(stream(self.llm.engine, self._request(messages, stop, kwargs))) as chunks:
            for piece in chunks:
                chunk = self._chunk(piece)
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        request = await asyncio.to_thread(self._request, messages, stop, kwargs)
        async with aclosing(astream(self.llm.engine, request)) as chunks:
            async for piece in chunks:
                chunk = self._chunk(piece)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _info(self, chunk: Chunk) -> dict[str, Any]:
        return generation_info(chunk, self.llm.engine, self.model_name)

    def _chunk(self, chunk: Chunk) -> ChatGenerationChunk:
        info = self._info(chunk)
        message = AIMessageChunk(
            content=chunk.text,
            response_metadata=info,
            usage_metadata=_usage_metadata(chunk.usage),
            chunk_position="last" if chunk.finish_reason else None,
        )
        return ChatGenerationChunk(message=message, generation_info=info or None)

    def _result(self, answer: Chunk) -> ChatResult:
        info = self._info(answer)
        message = AIMessage(content=answer.text, response_metadata=info, usage_metadata=_usage_metadata(answer.usage))
        return ChatResult(generations=[ChatGeneration(message=message, generation_info=info)])


def _usage_metadata(usage: Usage | None) -> UsageMetadata | None:
    if usage is None:
        return None
    return UsageMetadata(
        input_tokens=usage.prompt_tokens,
        output_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        input_token_details=InputTokenDetails(cache_read=usage.cached_tokens),
    )


def _refuse_far_too_long(messages: Sequence[BaseMessage], checkpoint: Checkpoint) -> None:
    """Raise `ContextOverflow` for a prompt that is many times as long as the context, without encoding all of it.

    Encoding a prompt cannot be interrupted, and of a megabyte it takes a second. So the beginning is counted first, a
    window at a time. Windows cut words in two, which makes a few tokens more of them; that is allowed for.
    """
    num_tokens = num_windows = 0
    if sum(len(message.text) for message in messages) <= MAX_ENCODED:
        return
    for index, message in enumerate(messages):
        for start in range(0, len(message.text), WINDOW):
            try:
                num_tokens += len(encode_text(checkpoint.tokenizer, message.text[start : start + WINDOW]))
            except InvalidMessage as error:
                raise InvalidMessage(f"messages[{index}].content", str(error)) from None
            num_windows += 1
            if num_tokens > checkpoint.context + num_windows * CUT_TOKENS:
                raise ContextOverflow(prompt=num_tokens, context=checkpoint.context, is_whole=False)


MAX_ENCODED = 200_000
"""Characters of a prompt that is encoded whole, whatever its tokens: that takes some tenths of a second."""
WINDOW = 32_768
"""Characters that are counted at once."""
CUT_TOKENS = 16
"""Tokens that cutting a text may add."""
