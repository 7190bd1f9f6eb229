"""The translation chain: a text of any length and a language in, the text in that language out."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import Annotated, Any, Literal

from langchain_core.callbacks import adispatch_custom_event
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.utils import AddableDict
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from chains.cancellable import run_cancellable
from chains.chain import Chain
from chains.documents.in_order import in_order
from chains.documents.languages import detect, find_language, is_same
from chains.documents.measure import Measure
from chains.errors import InputError
from chains.options import with_options, without_null
from chains.producing import Producer
from chains.segments import segments
from chains.texts import LanguageName, Text
from chains.translation_prompt import MIN_BUDGET, Wish, segment_tokens
from chains.translator import SegmentReport, Translator

AT_ONCE = 16
"""Segments that are translated at once, at most."""

PRESETS = {"temperature": 0.0, "repetition_penalty": 1.0}

EXAMPLE: dict[str, Any] = {"text": "Good morning, my friends!", "target_language": "French"}

Words = Annotated[Text, Field(max_length=100)]


class Term(BaseModel):
    """A term, and what it is called in the other language."""

    model_config = ConfigDict(extra="forbid")

    term: Annotated[Words, Field(description="As it stands in the text.")]
    translation: Annotated[Words, Field(description="As it is to stand in the translation.")]


def _pairs(glossary: object) -> object:
    if isinstance(glossary, dict):
        return [{"term": term, "translation": translation} for term, translation in glossary.items()]
    return glossary


class Delivery(BaseModel):
    """How a translation is to be."""

    model_config = ConfigDict(extra="forbid")

    target_language: Annotated[
        LanguageName,
        Field(description="The language to translate into, by name or BCP-47 code: German, 中文, pt-BR, …"),
    ]
    formality: Annotated[
        Literal["formal", "informal"] | SkipJsonSchema[None],
        Field(
            description="How the reader is addressed; as the text does if not given.", json_schema_extra=without_null
        ),
    ] = None
    glossary: Annotated[
        Annotated[list[Term], Field(max_length=100, fail_fast=True)],
        BeforeValidator(_pairs),
        Field(description="Terms that have to be translated so."),
    ] = []


class Source(BaseModel):
    """What a translation is made of."""

    model_config = ConfigDict(extra="forbid")

    text: Annotated[Text, Field(description="What to translate: plain or Markdown, of any length.")]
    source_language: Annotated[
        LanguageName | SkipJsonSchema[None],
        Field(description="The language of the text; found out if not given.", json_schema_extra=without_null),
    ] = None


class TranslateInput(Delivery, Source):
    """A text to translate."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})


class TranslatedDocument(BaseModel):
    """A translation, and what became of each part of the text."""

    text: str
    segments: list[SegmentReport]


class Translation:
    """Translates texts with one model."""

    def __init__(self, model: BaseChatModel) -> None:
        self._model = model
        self._measure = Measure(model)
        self._answer = with_options(model, **PRESETS)
        self.options = self._answer.options
        self.config_specs = self._answer.config_specs

    def messages(self, value: dict[str, Any], configurable: Mapping[str, Any]) -> list[BaseMessage]:
        """What the model is shown first. Raises InputError where its context is too small for anything."""
        asked = TranslateInput.model_validate(value)
        wish = _wish(asked)
        budget = self._budget(wish, self.options(configurable))
        first = next(segments(asked.text, budget=budget, count=self._measure.count))
        return wish.messages(first.words, after=first.after)

    def num_tokens(self, value: dict[str, Any], limit: int) -> int:
        """Tokens of a text, counted until they are more than a limit."""
        return self._measure.count_up_to(value["text"], limit)

    async def pieces(
        self, value: dict[str, Any], config: RunnableConfig, *, is_streamed: bool
    ) -> AsyncGenerator[str | SegmentReport]:
        """Yield the translation bit by bit, and after each segment of it what became of that."""
        asked = TranslateInput.model_validate(value)
        wish = await run_cancellable(_wish, asked)
        if wish.source is not None and is_same(wish.source, wish.target):
            kept = SegmentReport.kept(asked.text)
            yield asked.text
            await adispatch_custom_event("segment", kept.model_dump(), config=config)
            yield kept
            return
        options = self.options(config.get("configurable", {}))
        budget = await run_cancellable(self._budget, wish, options)
        translator = Translator(
            self._model,
            wish,
            options,
            config,
            measure=self._measure,
            total=len(asked.text),
            is_streamed=is_streamed,
        )
        jobs = (
            partial(translator.translate, segment)
            for segment in segments(asked.text, budget=budget, count=self._measure.count)
        )
        async with aclosing(in_order(jobs, at_once=config.get("max_concurrency") or AT_ONCE)) as pieces:
            async for piece in pieces:
                if isinstance(piece, SegmentReport):
                    await adispatch_custom_event("segment", piece.model_dump(), config=config)
                yield piece

    def _budget(self, wish: Wish, options: Mapping[str, Any]) -> int:
        measure, max_tokens = self._measure, options.get("max_tokens")
        tokens = segment_tokens(wish, measure, max_tokens=max_tokens)
        if tokens >= MIN_BUDGET:
            return tokens
        if max_tokens is not None and measure.count_messages(wish.messages("")) + max_tokens > measure.context:
            return MIN_BUDGET  # whoever asks the model so is told by how much it is too much
        wanted = [f"a translation into {wish.target}", *(["this glossary"] if wish.glossary else [])]
        wanted += [f"answers of {max_tokens} tokens"] if max_tokens is not None else []
        context = f"the model's context of {measure.context} tokens"
        raise InputError("glossary" if wish.glossary else "text", f"{context} has no room for {' with '.join(wanted)}")


def _wish(asked: TranslateInput) -> Wish:
    return Wish(
        source=find_language(asked.source_language) if asked.source_language else detect(asked.text),
        target=find_language(asked.target_language),
        formality=asked.formality,
        glossary={pair.term: pair.translation for pair in asked.glossary},
    )


def build(model: BaseChatModel) -> Chain:
    """Build the translation chain over a model."""
    translation = Translation(model)

    async def produce(value: Any, config: RunnableConfig, *, is_streamed: bool) -> AsyncGenerator[str]:
        async with aclosing(translation.pieces(value, config, is_streamed=is_streamed)) as pieces:
            async for piece in pieces:
                if isinstance(piece, str) and piece:
                    yield piece

    runnable = Producer(produce, name="translate", config_specs=translation.config_specs)
    return _hosted(
        translation, "translate", "Translate a text into another language.", runnable.with_types(output_type=str)
    )


def build_document(model: BaseChatModel) -> Chain:
    """Build the chain that tells of each segment besides."""
    translation = Translation(model)

    async def produce(value: Any, config: RunnableConfig, *, is_streamed: bool) -> AsyncGenerator[AddableDict]:
        async with aclosing(translation.pieces(value, config, is_streamed=is_streamed)) as pieces:
            async for piece in pieces:
                if isinstance(piece, SegmentReport):
                    yield AddableDict(segments=[piece.model_dump()])
                elif piece:
                    yield AddableDict(text=piece)

    runnable: Runnable[Any, Any] = Producer(produce, name="translate_document", config_specs=translation.config_specs)
    return _hosted(
        translation,
        "translate/document",
        "Translate a text, and tell what became of each part of it.",
        runnable.with_types(output_type=TranslatedDocument),
    )


def _hosted(translation: Translation, name: str, description: str, runnable: Runnable[Any, Any]) -> Chain:
    return Chain(
        name=name,
        description=description,
        runnable=runnable.with_types(input_type=TranslateInput),
        input_type=TranslateInput,
        messages=translation.messages,
        options=translation.options,
        num_tokens=translation.num_tokens,
        example=EXAMPLE,
    )


def to(language: str) -> Runnable[str, dict[str, Any]]:
    """Make a text the input of the translation chain: `summarize | to("German") | translate`."""
    return RunnableLambda(lambda text: {"text": text, "target_language": language}, name=f"to {language}")
