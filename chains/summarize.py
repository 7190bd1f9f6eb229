"""The summary chain: a text, a file or several documents of any length in, a short text out."""

import base64
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Annotated, Any, Literal, Self

import anyio
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict
from pydantic.json_schema import SkipJsonSchema

from chains.cancellable import checkpoint, run_cancellable
from chains.chain import Chain
from chains.documents.cutting import cut
from chains.documents.files import FileReader
from chains.documents.languages import find_language
from chains.documents.measure import Measure
from chains.errors import UnreadableFile
from chains.options import with_options, without_null
from chains.producing import Producer
from chains.summarizer import MIN_ROOM, NOTES, WHOLE, Summarizer, SummaryWish
from chains.texts import LanguageName, Text

Style = Literal["paragraph", "bullets", "headline", "key_points"]

STYLES: Mapping[Style, str] = {
    "paragraph": "one paragraph",
    "bullets": "a list of bullet points, each on a line that begins with '- '",
    "headline": "a single headline",
    "key_points": "the key points as a numbered list, the most important first",
}

PRESETS = {"temperature": 0.0, "repetition_penalty": 1.0}

EXAMPLE: dict[str, Any] = {
    "text": "The cat sat on the mat. It rained all day, so it did not want to go out.",
    "style": "headline",
}

SAMPLE = 4_096
"""Characters of a long text, of which the beginning is shown to see whether the context has room for any of it."""

DECODED_AT_ONCE = 2**18
"""Characters of base64; groups of four are whole in it."""

SOURCES = ("text", "file", "documents")


def _upload(schema: JsonDict) -> None:
    """LangServe's form shows a button to choose a file with."""
    without_null(schema)
    schema["extra"] = {"widget": {"type": "base64file"}}


def _underscored(style: object) -> object:
    return style.replace(" ", "_").replace("-", "_") if isinstance(style, str) else style


class Document(BaseModel):
    """A text with a title."""

    model_config = ConfigDict(extra="forbid")

    title: Annotated[str, Field(max_length=500, description="What it is called.")] = ""
    text: Annotated[Text, Field(description="What it says.")]

    def __str__(self) -> str:
        return f"# {self.title}\n\n{self.text}" if self.title.strip() else self.text


class SummarizeInput(BaseModel):
    """What to summarize: exactly one of `text`, `file` and `documents`."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    text: Annotated[
        Text | SkipJsonSchema[None],
        Field(description="What to summarize, of any length.", json_schema_extra=without_null),
    ] = None
    file: Annotated[
        str | SkipJsonSchema[None],
        Field(description="Or a file: PDF, DOCX, HTML, Markdown or plain text, in base64.", json_schema_extra=_upload),
    ] = None
    documents: Annotated[
        # LangServe's form shows as many as there must be, and waits for them to be filled in: so there need be none.
        Annotated[list[Document], Field(max_length=1000, fail_fast=True)] | SkipJsonSchema[None],
        Field(description="Or several texts with titles.", json_schema_extra=without_null),
    ] = None
    style: Annotated[Style, BeforeValidator(_underscored), Field(description="The form of the summary.")] = "paragraph"
    max_words: Annotated[
        Annotated[int, Field(strict=True, ge=5, le=2000)] | SkipJsonSchema[None],
        Field(description="How long it may be; asked of the model.", json_schema_extra=without_null),
    ] = None
    language: Annotated[
        LanguageName | SkipJsonSchema[None],
        Field(description="The language of the summary; the text's own if not given.", json_schema_extra=without_null),
    ] = None
    focus: Annotated[
        Annotated[str, Field(min_length=1, max_length=1000)] | SkipJsonSchema[None],
        Field(description="A question to keep in view.", json_schema_extra=without_null),
    ] = None

    @model_validator(mode="after")
    def _check_sources(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(SOURCES)}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def whole(self) -> str:
        """All that is to be summarized. Not of a file: see `prepare`."""
        if self.text is not None:
            return self.text
        texts = []
        for document in self.documents or ():
            checkpoint()
            texts.append(str(document))
        return "\n\n".join(texts)

    @property
    def wish(self) -> SummaryWish:
        """What is asked for."""
        return SummaryWish(
            form=STYLES[self.style],
            max_words=self.max_words,
            language=find_language(self.language).name if self.language else None,
            focus=self.focus,
        )


def _decode(file: str) -> bytes:
    """The bytes of base64, in lines or not, or of a data URL. Raises ValueError."""
    encoded = file
    if file.startswith("data:"):
        head, _, encoded = file.partition(",")
        if not head.endswith(";base64"):
            raise ValueError("the data URL does not say ;base64")
    encoded = encoded.replace("\r", "").replace("\n", "")
    if encoded.find("=", 0, -2) >= 0:
        raise ValueError("there is padding before its end")
    decoded = bytearray()
    # Piece by piece: Python's other threads stand still while one is decoded.
    for start in range(0, len(encoded), DECODED_AT_ONCE):
        checkpoint()
        decoded += base64.b64decode(encoded[start : start + DECODED_AT_ONCE], validate=True)
    return bytes(decoded)


async def prepare(asked: BaseModel, reader: FileReader) -> BaseModel:
    """Read the file of an input, if it has one, and put its text in its place. Raises InputError."""
    assert isinstance(asked, SummarizeInput)
    if not asked.file:
        return asked
    try:
        content = await run_cancellable(_decode, asked.file)
    except ValueError as error:
        raise UnreadableFile("file", f"the file is not in base64: {error}") from error
    read = await reader.read(content)
    # Off the event loop: a text of millions of characters is stripped for 0.1 s.
    document = await run_cancellable(Document, title=read.title[:500], text=read.text)
    return asked.model_copy(update={"file": None, "documents": [document]})


def build(model: BaseChatModel) -> Chain:
    """Build the summary chain over a model."""
    measure = Measure(model)
    answer = with_options(model, **PRESETS)
    at_once = anyio.CapacityLimiter(2)

    def messages(value: dict[str, Any], configurable: Mapping[str, Any]) -> list[BaseMessage]:
        asked = SummarizeInput.model_validate(value)
        room = Summarizer(model, asked.wish, answer.options(configurable), {}, measure).room()
        if measure.is_at_most(asked.whole, room):
            return asked.wish.final(WHOLE, asked.whole)
        return asked.wish.final(NOTES, cut(asked.whole[:SAMPLE], budget=MIN_ROOM, count=measure.count)[0])

    async def produce(value: Any, config: RunnableConfig, *, is_streamed: bool) -> AsyncGenerator[str]:
        reader = FileReader(turn=lambda: at_once)  # its limits are those of one request
        # Off the event loop: a batch begins with all of its inputs at once, each of which may have many documents.
        asked = await prepare(await run_cancellable(SummarizeInput.model_validate, value), reader)
        assert isinstance(asked, SummarizeInput)
        whole = await run_cancellable(getattr, asked, "whole")
        options = answer.options(config.get("configurable", {}))
        async with aclosing(Summarizer(model, asked.wish, options, config, measure).pieces(whole)) as pieces:
            async for piece in pieces:
                yield piece

    runnable = Producer(produce, name="summarize", config_specs=answer.config_specs)
    return Chain(
        name="summarize",
        description="Summarize a text, a file or several documents.",
        runnable=runnable.with_types(input_type=SummarizeInput, output_type=str),
        input_type=SummarizeInput,
        messages=messages,
        options=answer.options,
        num_tokens=lambda value, limit: measure.count_up_to(SummarizeInput.model_validate(value).whole, limit),
        prepare=prepare,
        example=EXAMPLE,
    )
