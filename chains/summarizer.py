"""How a text of any length becomes a short one: at once where it fits, else part by part, and then the parts' summaries
together, as often as it takes. Knows its model by its count of tokens."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from langchain_core.callbacks import adispatch_custom_event
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.messages.ai import AIMessageChunk, UsageMetadata, add_usage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import patch_config

from chains.cancellable import run_cancellable
from chains.documents.cutting import cut
from chains.documents.in_order import Job, in_order
from chains.documents.measure import Measure
from chains.errors import InputError
from chains.texts import instructions

AT_ONCE = 16
"""Parts that are summarized at once."""

CHUNK_TOKENS = 2_000
"""Of a part, at most."""

NOTE_TOKENS = 256
"""Of the summary of a part, at most."""

NOTE_WORDS = 120

MIN_ROOM = 64
"""Tokens of text that have to fit into the context together with all else."""

FINAL = ChatPromptTemplate(
    [
        instructions(
            "You summarize texts. Use only what the text says. Answer with the summary alone. "
            "Write {form}{length}{language}.{focus}"
        ),
        ("human", "{order}:\n\n{text}"),
    ]
)

NOTE = ChatPromptTemplate(
    [
        instructions(
            "You summarize a part of a longer text. Use only what it says; keep names, numbers and results. "
            f"Answer with the summary alone. Write one paragraph of at most {NOTE_WORDS} words{{language}}.{{focus}}"
        ),
        ("human", "{order}:\n\n{text}"),
    ]
)

WHOLE = "Summarize this text"
PART = "Summarize this part"
NOTES = "These are summaries of the parts of a text, in order. Summarize the text"


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryWish:
    """What is asked of a summary."""

    form: str
    max_words: int | None
    language: str | None
    """Its name; None: that of the text."""
    focus: str | None
    """A question to keep in view."""

    def final(self, order: str, text: str) -> list[BaseMessage]:
        """What the model is shown to write the summary."""
        length = f" of at most {self.max_words} words" if self.max_words else ""
        return FINAL.format_messages(form=self.form, length=length, order=order, text=text, **self._common)

    def note(self, order: str, text: str) -> list[BaseMessage]:
        """What it is shown to summarize a part."""
        return NOTE.format_messages(order=order, text=text, **self._common)

    @property
    def _common(self) -> dict[str, str]:
        return {
            "language": f" in {self.language}" if self.language else ", in the language of the text",
            "focus": f" Keep in view what it says to this: {self.focus}" if self.focus else "",
        }


@dataclass(slots=True)
class Told:
    """What there is to tell of a summary besides its text."""

    num_parts: int = 1
    num_cut_off: int = 0
    """Summaries of parts that ended by their greatest length."""
    problems: list[str] = field(default_factory=list)
    finish_reason: str | None = None
    usage: UsageMetadata | None = None

    def add(self, chunk: BaseMessage) -> None:
        """Count in a piece of an answer."""
        if isinstance(chunk, AIMessageChunk) and chunk.usage_metadata:
            self.usage = add_usage(self.usage, chunk.usage_metadata)


class Summarizer:
    """Summarizes one text."""

    def __init__(
        self,
        model: BaseChatModel,
        wish: SummaryWish,
        options: Mapping[str, Any],
        config: RunnableConfig,
        measure: Measure,
    ) -> None:
        """Begin.

        Args:
            model: Any chat model.
            wish: What is asked for.
            options: Call arguments for the model; `max_tokens` and `stop` are for the final summary alone.
            config: Of the run that this is part of.
            measure: The model's.
        """
        self._model = model
        self._wish = wish
        self._options = options
        self._config = config
        self._measure = measure
        self.told = Told()

    def room(self) -> int:
        """Tokens of text that the model can be shown to write the final summary from."""
        answer = self._measure.answer_tokens(self._options.get("max_tokens"))
        return self._measure.context - answer - self._measure.count_messages(self._wish.final(NOTES, ""))

    async def pieces(self, text: str) -> AsyncGenerator[str]:
        """Yield the summary as it comes."""
        room = await run_cancellable(self.room)
        if await run_cancellable(self._measure.is_at_most, text, room):
            order, shown = WHOLE, text
        else:
            order, shown = NOTES, await self._condensed(text, room)
        await self._progress("summarize", 0, 1)
        answer = self._model.astream(
            self._wish.final(order, shown), patch_config(self._config, run_name="summarize"), **self._options
        )
        written = ""
        async with aclosing(answer) as chunks:  # type: ignore[type-var]
            async for chunk in chunks:
                self.told.add(chunk)
                self.told.finish_reason = chunk.response_metadata.get("finish_reason") or self.told.finish_reason
                written += chunk.text
                yield chunk.text
        await self._progress("summarize", 1, 1)
        await self._tell(written)

    async def _condensed(self, text: str, room: int) -> str:
        """Summaries of all parts, of as few tokens as there is room for. Raises InputError if there is next to none."""
        context = self._measure.context
        most = min(NOTE_TOKENS, context // 16)
        budget = min(CHUNK_TOKENS, context - most - self._measure.count_messages(self._wish.note(NOTES, "")))
        if min(room, budget) < MIN_ROOM:
            raise InputError("text", f"the context of {context} tokens has no room for a text besides what is asked")
        note_tokens = min(most, room // 4, budget // 4)
        cut_up = await run_cancellable(cut, text, budget=budget, count=self._measure.count)
        parts = [part for part in cut_up if part.strip()]
        self.told.num_parts = len(parts)
        stage, order = "map", PART
        while True:
            notes = await self._notes(stage, order, parts, note_tokens)
            shown = "\n\n".join(notes)
            if await run_cancellable(self._measure.is_at_most, shown, room):
                return shown
            parts = await run_cancellable(self._grouped, notes, budget)
            stage, order = "collapse", NOTES

    async def _notes(self, stage: str, order: str, parts: Sequence[str], note_tokens: int) -> list[str]:
        """A summary for each part, in order."""
        await self._progress(stage, 0, len(parts))
        done = 0

        async def note(part: str, name: str, _: asyncio.Event) -> AsyncGenerator[str]:
            nonlocal done
            written = await self._note(order, part, name, note_tokens)
            done += 1
            await self._progress(stage, done, len(parts))
            yield written

        # No slash: LangChain makes a path of the name in /stream_log, and readers of that break off.
        jobs: Iterator[Job[str]] = (
            partial(note, part, f"{stage} {index} of {len(parts)}") for index, part in enumerate(parts, 1)
        )
        async with aclosing(in_order(jobs, at_once=self._config.get("max_concurrency") or AT_ONCE)) as notes:
            return [note async for note in notes]

    async def _note(self, order: str, part: str, name: str, note_tokens: int) -> str:
        """The summary of a part; where the model has none, how the part begins: no part is missing."""
        message = await self._model.ainvoke(
            self._wish.note(order, part),
            patch_config(self._config, run_name=name),
            **{**self._options, "max_tokens": note_tokens, "stop": None},
        )
        self.told.usage = add_usage(self.told.usage, message.usage_metadata)
        self.told.num_cut_off += message.response_metadata.get("finish_reason") == "length"
        written = message.text.strip()
        if not written:
            self.told.problems.append(f"{name} has no summary: its beginning stands for it")
            return (await run_cancellable(cut, part.strip(), budget=note_tokens, count=self._measure.count))[0]
        first, *more = await run_cancellable(cut, written, budget=2 * note_tokens, count=self._measure.count)
        if more:
            self.told.problems.append(f"the summary of {name} is too long: its end is left out")
        return first

    def _grouped(self, notes: Sequence[str], budget: int) -> list[str]:
        """Put neighbours together, at least two, as many as fit."""
        groups: list[list[str]] = []
        room = 0
        for note in notes:
            tokens = self._measure.count(note) + SEPARATOR_TOKENS
            if groups and (tokens <= room or len(groups[-1]) < 2):
                groups[-1].append(note)
                room -= tokens
            else:
                groups.append([note])
                room = budget - tokens
        return ["\n\n".join(group) for group in groups]

    async def _progress(self, stage: str, done: int, total: int) -> None:
        await adispatch_custom_event("progress", {"stage": stage, "done": done, "total": total}, config=self._config)

    async def _tell(self, written: str) -> None:
        words, most = len(written.split()), self._wish.max_words
        if most and words > most:
            self.told.problems.append(f"{words} words where at most {most} were asked for")
        if self.told.num_cut_off:
            self.told.problems.append(f"cut off at their greatest length: {self.told.num_cut_off} summaries of parts")
        if self.told.finish_reason == "length":
            self.told.problems.append("the summary was cut off at its greatest length")
        if not words:
            self.told.problems.append("the summary is empty")
        told = {
            "num_words": words,
            "max_words": most,
            "num_parts": self.told.num_parts,
            "finish_reason": self.told.finish_reason,
            "usage": self.told.usage,
            "problems": self.told.problems,
        }
        await adispatch_custom_event("summary", told, config=self._config)


SEPARATOR_TOKENS = 2
