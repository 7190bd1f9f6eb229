"""`LLaMA3_LLM`: a local Llama 3 as a LangChain LLM, a string in and a string out. Knows no chat model and no HTTP."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, closing
from typing import Annotated, Any

from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models.llms import LLM
from langchain_core.messages import BaseMessage, HumanMessage, MessageLikeRepresentation, convert_to_messages
from langchain_core.outputs import GenerationChunk, LLMResult
from pydantic import Field, SkipValidation, ValidationError

from llm.answering import acomplete, astream, build_request, complete, generation_info, stream
from llm.engine import Engine, Request
from llm.errors import InvalidMessage
from llm.generation import Chunk, Usage
from llm.prompt import encode, encode_text
from llm.sampling import OPTIONS, Sampling, options_of


class LLaMA3_LLM(LLM):
    """A local Llama 3 for LangChain.

    A string is put to the model as one user message, in the checkpoint's own chat template. Earlier turns are passed
    in with each call and never kept: `llm.invoke("And yours?", history=[("user", "My name is Ada."), ("ai", "Hi!")])`.

    Every sampling option is a field (the default) and a call argument (`llm.invoke(text, temperature=0)`).
    """

    engine: Annotated[Engine, SkipValidation] = Field(exclude=True, repr=False)
    """What generates. One engine serves any number of models, so that weights are loaded once."""
    model_name: str
    """The model reference."""
    max_tokens: int | None = 512
    """New tokens at most, fewer where the context has less room; None: what room is left."""
    temperature: float = 0.5
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.1
    seed: int | None = None
    stop: list[str] | None = None
    timeout: float | None = None
    """Seconds that a call may take, waiting included."""

    def __init__(
        self,
        reference: str | None = None,
        /,
        *,
        mode_name_or_path: str | None = None,
        engine: Engine | None = None,
        dtype: str = "auto",
        device: str = "auto",
        **fields: Any,
    ) -> None:
        """Load a model and wait for it, or use an engine that is there.

        Args:
            reference: `embedded`, a path, `hf:org/name[@revision]` or `modelscope:org/name[@revision]`.
            mode_name_or_path: The same, by the keyword that the tutorials use.
            engine: Use this instead of loading; `dtype` and `device` are then not allowed.
            dtype: `auto` (the checkpoint's own), `bfloat16`, `float16` or `float32`.
            device: `auto` (all GPUs, else the CPU), `cpu`, `cuda` or `cuda:N`.
            fields: Sampling defaults and what every LangChain model takes (`callbacks`, `tags`, …).

        Raises:
            ModelError: The model cannot be had; the message says what to do.
            InvalidOption: A sampling default, dtype or device is not allowed.
        """
        if reference is not None and mode_name_or_path is not None:
            raise TypeError("give the model once: positionally or as mode_name_or_path")
        if unknown := fields.keys() - type(self).model_fields.keys():
            raise TypeError(f"LLaMA3_LLM takes no argument {', '.join(sorted(unknown))}")
        reference = reference or mode_name_or_path
        Sampling.of({name: fields.get(name) for name in OPTIONS})  # refuses defaults that no call could use
        loaded: Engine | None = None
        if engine is None:
            from llm.local_engine import LocalEngine

            engine = loaded = LocalEngine(reference or "embedded", dtype=dtype, device=device)
            loaded.wait_until_ready()
        elif reference is not None or dtype != "auto" or device != "auto":
            raise TypeError("an engine has its model, dtype and device already")
        fields.setdefault("model_name", engine.health().model)
        try:
            super().__init__(engine=engine, **fields)
        except ValidationError:  # of a field: nobody would ever close what was loaded for it
            if loaded is not None:
                loaded.close()
            raise

    def __call__(self, prompt: str, stop: list[str] | None = None, **kwargs: Any) -> str:
        """Answer a prompt, as the tutorials call it."""
        return self.invoke(prompt, stop=stop, **kwargs)

    @property
    def _llm_type(self) -> str:
        return "llama3"

    @property
    def _identifying_params(self) -> Mapping[str, Any]:
        return {"model_name": self.model_name, **options_of(self)}

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text alone, without template; special tokens in it are plain text."""
        return encode_text(self.engine.checkpoint.tokenizer, text)

    def close(self) -> None:
        """End what runs and free the model. It cannot be used afterwards."""
        self.engine.close()

    # From call arguments to a running generation. ChatLLaMA3 uses these too.

    def sampling(self, options: Mapping[str, Any], *, prompt_tokens: int, context: int) -> Sampling:
        """Merge call arguments into the defaults. A default `max_tokens` gives way where the context has less room."""
        given = {name: value for name, value in options.items() if value is not None}
        merged = {**options_of(self), **given}
        if "max_tokens" in merged and "max_tokens" not in given:
            merged["max_tokens"] = max(1, min(merged["max_tokens"], context - prompt_tokens))
        return Sampling.of(merged)

    def request(self, prompt: str, stop: list[str] | None, options: Mapping[str, Any]) -> Request:
        """What the engine is asked for when `prompt` is put as a user message after `history`."""
        checkpoint = self.engine.checkpoint
        options = dict(options)
        ids = encode(checkpoint.tokenizer, [*_history(options.pop("history", ())), HumanMessage(prompt)])
        sampling = self.sampling({**options, "stop": stop}, prompt_tokens=len(ids), context=checkpoint.context)
        return build_request(ids, sampling, timeout_s=self.timeout)

    # LangChain's hooks.

    def _generate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        return self._result(complete(self.engine, [self.request(prompt, stop, kwargs) for prompt in prompts]))

    async def _agenerate(
        self,
        prompts: list[str],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> LLMResult:
        requests = await asyncio.to_thread(lambda: [self.request(prompt, stop, kwargs) for prompt in prompts])
        return self._result(await acomplete(self.engine, requests))

    def _call(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return self._generate([prompt], stop, run_manager, **kwargs).generations[0][0].text

    async def _acall(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> str:
        return (await self._agenerate([prompt], stop, run_manager, **kwargs)).generations[0][0].text

    def _stream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[GenerationChunk]:
        with closing(stream(self.engine, self.request(prompt, stop, kwargs))) as chunks:
            for chunk in map(self._generation_chunk, chunks):
                if run_manager is not None:
                    run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    async def _astream(
        self,
        prompt: str,
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[GenerationChunk]:
        request = await asyncio.to_thread(self.request, prompt, stop, kwargs)
        async with aclosing(astream(self.engine, request)) as chunks:
            async for piece in chunks:
                chunk = self._generation_chunk(piece)
                if run_manager is not None:
                    await run_manager.on_llm_new_token(chunk.text, chunk=chunk)
                yield chunk

    def _generation_chunk(self, chunk: Chunk) -> GenerationChunk:
        return GenerationChunk(text=chunk.text, generation_info=self._info(chunk))

    def _info(self, chunk: Chunk) -> dict[str, Any]:
        return generation_info(chunk, self.engine, self.model_name)

    def _result(self, answers: Sequence[Chunk]) -> LLMResult:
        usages = [answer.usage or Usage(0, 0) for answer in answers]
        prompt_tokens = sum(usage.prompt_tokens for usage in usages)
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return LLMResult(
            generations=[[self._generation_chunk(answer)] for answer in answers],
            llm_output={
                "model_name": self.model_name,
                "token_usage": {
                    "prompt_tokens": prompt_tokens,
                    "completion_tokens": completion_tokens,
                    "total_tokens": prompt_tokens + completion_tokens,
                },
            },
        )


def _history(history: Sequence[MessageLikeRepresentation] | None) -> list[BaseMessage]:
    if isinstance(history, str):
        raise InvalidMessage("history", "history is a list of messages, not a string")
    try:
        return convert_to_messages(history or ())
    except (TypeError, ValueError, NotImplementedError) as error:
        raise InvalidMessage("history", f"history holds something that is no message: {error}") from error
