"""Summarize and translate in one go: the two chains, put together with `|`."""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.runnables import Runnable, RunnableBinding, RunnableLambda
from pydantic import ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from chains import summarize, translate
from chains.chain import Chain
from chains.options import without_null
from chains.summarize import SummarizeInput
from chains.texts import LanguageName
from chains.translate import Delivery

EXAMPLE: dict[str, Any] = {
    "text": "The cat sat on the mat. It rained all day, so it did not want to go out.",
    "style": "headline",
    "target_language": "German",
}


class BriefInput(Delivery, SummarizeInput):
    """What to summarize, and the language to deliver the summary in."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    language: Annotated[
        LanguageName | SkipJsonSchema[None],
        Field(
            description="The language to summarize in first; the text's own if not given.",
            json_schema_extra=without_null,
        ),
    ] = None


def _of_summary(value: dict[str, Any]) -> dict[str, Any]:
    return {name: value[name] for name in SummarizeInput.model_fields if value.get(name) is not None}


def _of_translation(value: dict[str, Any], summary: str) -> dict[str, Any]:
    wished = {name: value[name] for name in Delivery.model_fields if value.get(name) is not None}
    return {**wished, "text": summary, "source_language": value.get("language")}


OF_ANY_LENGTH = {"max_tokens": None, "stop": None}
"""Where the summary ends is not where each segment of its translation does."""


def build(model: BaseChatModel) -> Chain:
    """Build the chain over a model."""
    summarizing, translating = summarize.build(model), translate.build(model)
    summarizer = summarizing.runnable
    translator: Runnable[Any, Any] = RunnableBinding(
        bound=translating.runnable, config_factories=[lambda _: {"configurable": OF_ANY_LENGTH}]
    )

    def deliver(value: dict[str, Any]) -> Runnable[Any, Any]:  # no `assign`: what it runs goes on when it is cancelled
        translation = RunnableLambda(partial(_of_translation, value)) | translator
        # An empty summary was told, and is delivered as it is.
        if_any = RunnableLambda(lambda summary: translation if summary.strip() else summary, name="deliver")
        return RunnableLambda(_of_summary) | summarizer | if_any

    def messages(value: dict[str, Any], configurable: Mapping[str, Any]) -> list[BaseMessage]:
        translating.messages(_of_translation(value, "A summary."), {**configurable, **OF_ANY_LENGTH})
        return summarizing.messages(_of_summary(value), configurable)

    def num_tokens(value: dict[str, Any], limit: int) -> int:
        assert summarizing.num_tokens is not None
        return summarizing.num_tokens(_of_summary(value), limit)

    return Chain(
        name="brief",
        description="Summarize a text, a file or several documents in another language.",
        runnable=RunnableLambda(deliver, name="brief").with_types(input_type=BriefInput, output_type=str),
        input_type=BriefInput,
        messages=messages,
        options=summarizing.options,
        num_tokens=num_tokens,
        prepare=summarizing.prepare,
        example=EXAMPLE,
    )
