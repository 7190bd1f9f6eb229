"""The translation chain: a text and a language in, the text in that language out."""

from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import Runnable, RunnableLambda
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints
from pydantic.json_schema import SkipJsonSchema

from chains.chain import Chain
from chains.options import with_options, without_null


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text must not be empty")
    return text


Text = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
# Browsers check the pattern too, and to JavaScript \w is ASCII: no 中文, no Français.
Language = Annotated[
    str, StringConstraints(min_length=1, max_length=60, pattern=r"^[\p{L}\p{N}][\p{L}\p{M}\p{N}_ ()'-]*$")
]

PROMPT = ChatPromptTemplate(
    [
        (
            "system",
            "You are a professional translator. Translate the user's text{source} into {target_language}. "
            "Keep meaning, tone and formatting. Answer with the translation alone, without notes or quotation marks.",
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


def build(model: BaseChatModel) -> Chain:
    """Build the translation chain over a model."""
    answer = with_options(model, temperature=0.0, repetition_penalty=1.0)
    pipeline: Runnable[Any, Any] = RunnableLambda(_variables, name="variables") | PROMPT | answer | StrOutputParser()
    runnable = pipeline.with_types(input_type=TranslateInput, output_type=str)
    return Chain(
        name="translate",
        description="Translate a text into another language.",
        runnable=runnable,
        input_type=TranslateInput,
        messages=messages,
        options=answer.options,
        example=EXAMPLE,
    )


def to(language: str) -> Runnable[str, dict[str, Any]]:
    """Make a text the input of the translation chain: `summarize | to("German") | translate`."""
    return RunnableLambda(lambda text: {"text": text, "target_language": language}, name=f"to {language}")


def messages(translate_input: dict[str, Any]) -> list[BaseMessage]:
    """What the model is shown."""
    return PROMPT.invoke(_variables(translate_input)).to_messages()


def _variables(translate_input: dict[str, Any]) -> dict[str, Any]:
    source_language = translate_input.get("source_language")
    return {**translate_input, "source": f" from {source_language}" if source_language else ""}
