"""The summary chain: a text in, a short one out."""

from typing import Annotated, Any, Literal

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableLambda
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from chains.chain import Chain
from chains.options import without_null
from chains.texts import Language, Text, instructions

STYLES = {
    "paragraph": "one paragraph",
    "bullets": "a list of bullet points, each on a line that begins with '- '",
    "headline": "a single headline",
}

PROMPT = ChatPromptTemplate(
    [
        instructions(
            "You summarize texts. Use only what the text says. Answer with the summary alone. "
            "Write {form}{length}{language}."
        ),
        ("human", "Summarize this text:\n\n{text}"),
    ]
)

EXAMPLE: dict[str, Any] = {
    "text": "The cat sat on the mat. It rained all day, so it did not want to go out.",
    "style": "headline",
}


class SummarizeInput(BaseModel):
    """A text to summarize."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    text: Annotated[Text, Field(description="What to summarize.")]
    style: Annotated[Literal["paragraph", "bullets", "headline"], Field(description="The form of the summary.")] = (
        "paragraph"
    )
    max_words: Annotated[
        Annotated[int, Field(strict=True, ge=5, le=2000)] | SkipJsonSchema[None],
        Field(description="How long it may be; asked of the model.", json_schema_extra=without_null),
    ] = None
    language: Annotated[
        Language | SkipJsonSchema[None],
        Field(description="The language of the summary; the text's own if not given.", json_schema_extra=without_null),
    ] = None


def _variables(summarize_input: dict[str, Any]) -> dict[str, Any]:
    max_words, language = summarize_input.get("max_words"), summarize_input.get("language")
    return {
        "text": summarize_input["text"],
        "form": STYLES[summarize_input.get("style") or "paragraph"],
        "length": f" of at most {max_words} words" if max_words else "",
        "language": f" in {language}" if language else ", in the language of the text",
    }


prompt = RunnableLambda(_variables, name="variables") | PROMPT
"""From an input to what the model is shown."""


def build(model: BaseChatModel) -> Chain:
    """Build the summary chain over a model."""
    return Chain.of(
        prompt,
        model,
        StrOutputParser(),
        name="summarize",
        description="Summarize a text.",
        input_type=SummarizeInput,
        output_type=str,
        presets={"temperature": 0.0, "repetition_penalty": 1.0},
        example=EXAMPLE,
    )
