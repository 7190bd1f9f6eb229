"""The translation chain: a text and a language in, the text in that language out."""

from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from chains.chain import Chain
from chains.options import without_null
from chains.texts import Language, Text, instructions

PROMPT = ChatPromptTemplate(
    [
        instructions(
            "You are a professional translator. Translate the user's text{source} into {target_language}. "
            "Keep meaning, tone and formatting. Answer with the translation alone, without notes or quotation marks."
        ),
        ("human", "{text}"),
    ]
)

EXAMPLE: dict[str, Any] = {"text": "Good morning, my friends!", "target_language": "French"}


class TranslateInput(BaseModel):
    """A text to translate."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    text: Annotated[Text, Field(description="What to translate.")]
    target_language: Annotated[Language, Field(description="The language to translate into: German, 中文, …")]
    source_language: Annotated[
        Language | SkipJsonSchema[None],
        Field(
            description="The language of the text; found out if not given.",
            json_schema_extra=without_null,
        ),
    ] = None


def _variables(translate_input: dict[str, Any]) -> dict[str, Any]:
    source_language = translate_input.get("source_language")
    return {**translate_input, "source": f" from {source_language}" if source_language else ""}


prompt = RunnableLambda(_variables, name="variables") | PROMPT
"""From an input to what the model is shown."""


def build(model: BaseChatModel) -> Chain:
    """Build the translation chain over a model."""
    return Chain.of(
        prompt,
        model,
        StrOutputParser(),
        name="translate",
        description="Translate a text into another language.",
        input_type=TranslateInput,
        output_type=str,
        presets={"temperature": 0.0, "repetition_penalty": 1.0},
        example=EXAMPLE,
    )


def to(language: str) -> Runnable[str, dict[str, Any]]:
    """Make a text the input of the translation chain: `summarize | to("German") | translate`."""
    return RunnableLambda(lambda text: {"text": text, "target_language": language}, name=f"to {language}")
