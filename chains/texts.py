"""Types of texts and languages in the inputs of chains."""

from typing import Annotated

from pydantic import AfterValidator, Field, StringConstraints


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("the text must not be empty")
    return text


Text = Annotated[str, AfterValidator(_not_blank), Field(json_schema_extra={"pattern": r"\S"})]
"""Anything but white space alone."""

Language = Annotated[
    # Browsers check the pattern too, and to JavaScript \w is ASCII: no 中文, no Français.
    str, StringConstraints(min_length=1, max_length=60, pattern=r"^[\p{L}\p{N}][\p{L}\p{M}\p{N}_ ()'-]*$")
]
"""The name of a language, in any language."""
