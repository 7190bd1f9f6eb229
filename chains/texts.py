"""Types of texts and languages in the inputs of chains, and the chains' own words."""

from string import Formatter
from typing import Annotated

from langchain_core.prompts import SystemMessagePromptTemplate
from pydantic import AfterValidator, Field, StringConstraints

from chains.documents.languages import find_language


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text must not be empty")
    return text


Text = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
"""Anything but white space alone."""


def _known(name: str) -> str:
    find_language(name)
    return name


LanguageName = Annotated[str, StringConstraints(min_length=1, max_length=60), AfterValidator(_known)]
"""A language, by its name in any language or by its BCP-47 code."""


def instructions(template: str) -> SystemMessagePromptTemplate:
    """A chain's own system prompt; variables in braces are best at its end.

    What comes before the first of them is the same for everybody. It is marked so (`shared_chars`), and a model that
    knows the mark computes it once for all; others ignore it.
    """
    head, *_ = next(iter(Formatter().parse(template)))
    marked = SystemMessagePromptTemplate.from_template(template, additional_kwargs={"shared_chars": len(head)})
    assert isinstance(marked, SystemMessagePromptTemplate)
    return marked
