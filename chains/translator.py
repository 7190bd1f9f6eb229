"""How one segment is translated: asked for, looked at, and if it is not good, asked for again in smaller pieces."""

import asyncio
import math
import re
from collections.abc import AsyncGenerator, Collection, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import BaseMessage
from langchain_core.messages.ai import AIMessageChunk, UsageMetadata, add_usage
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import patch_config
from pydantic import BaseModel, ConfigDict

from chains.cancellable import run_cancellable
from chains.documents.cutting import MIN_BUDGET as MIN_PIECE
from chains.documents.cutting import cut
from chains.documents.languages import is_written_in
from chains.documents.markup import Part, faults, finer
from chains.documents.measure import Measure
from chains.segments import Segment
from chains.translation_prompt import Wish, folded


class SegmentReport(BaseModel):
    """What became of a segment. All sources put together are the text, all targets its translation."""

    model_config = ConfigDict(frozen=True)

    index: int
    source: str
    """Of words in a quote, a list item, or with a `[label]`, that had to be cut: all of it with the first piece, and
    nothing with the others."""
    target: str
    status: Literal["kept", "translated", "mended", "faulty"]
    """kept: there was nothing to translate; mended: right at the second try; faulty: see `problems`."""
    problems: list[str]
    """What is wrong with it; terms of the glossary that it does not use are no reason to call it faulty."""
    finish_reason: str | None
    usage: UsageMetadata | None
    """Of all tries."""
    done: int
    """Characters of the text up to here."""
    total: int

    @classmethod
    def kept(cls, text: str) -> Self:
        """Of a text that is as it should be."""
        return cls(
            index=0,
            source=text,
            target=text,
            status="kept",
            problems=[],
            finish_reason=None,
            usage=None,
            done=len(text),
            total=len(text),
        )


@dataclass(slots=True)
class Attempt:
    """An answer as it comes."""

    words: str
    stops: Collection[str] = ()
    """The stop strings that were asked for."""
    num_out: int = 0
    """Characters of `text` that have gone out."""
    finish_reason: str | None = None
    stop_reason: str | None = None
    """The stop string that ended it, if one did."""
    usage: UsageMetadata | None = None
    problems: list[str] = field(default_factory=list)
    mended: str | None = None
    """What stands for the answer, if it was put together from several."""
    is_copy: bool = field(default=True, init=False)
    """Whether all there is so far stands in the source just so, or it begins with all of the source."""
    _text: str = field(default="", init=False)
    _space: str = field(default="", init=False)
    """White space after it: what becomes of that depends on what comes next."""
    _new_marks: frozenset[str] = field(init=False)
    """Those that the source does not have."""
    _has_new_marks: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._new_marks = MARKS.difference(self.words)

    def add(self, chunk: BaseMessage) -> None:
        """Take in more of the answer. The cost is that of the chunk, but for what may still be a copy of the source."""
        self._append(chunk.text)
        self.finish_reason = chunk.response_metadata.get("finish_reason") or self.finish_reason
        # Some models tell of any end by this name: Anthropic's call it `end_turn`.
        if (stop_reason := chunk.response_metadata.get("stop_reason")) in self.stops:
            self.stop_reason = stop_reason
        if isinstance(chunk, AIMessageChunk):
            self.usage = add_usage(self.usage, chunk.usage_metadata) if chunk.usage_metadata else self.usage

    def _append(self, new: str) -> None:
        words = new.rstrip() if self._text else new.strip()
        if not words:
            self._space += new if self._text else ""
            return
        added, self._space = self._space + words, new[len(new.rstrip()) :]
        added = PARAGRAPH_END.sub("\n", added) if "\n" in self.words else LINE_END.sub(" ", added)
        num_before = len(self._text)
        self._text += added
        self._has_new_marks = self._has_new_marks or not self._new_marks.isdisjoint(added)
        source = self.words.casefold() if self.is_copy else ""
        if num_before < len(source):
            said = self._text[: len(source)].casefold()
            self.is_copy = source.startswith(said) or said.startswith(source)

    @property
    def has_new_marks(self) -> bool:
        """Whether there is something of Markdown, or of a placeholder, in it that the source does not have."""
        return self._has_new_marks or bool(ITEM.match(self._text) and not ITEM.match(self.words))

    @property
    def is_cut_off(self) -> bool:
        """Whether it ended before the model had said all."""
        return self.finish_reason == "length" or self.stop_reason is not None

    @property
    def text(self) -> str:
        """The answer so far, without what would end a paragraph: each is a beginning of the next."""
        return self._text if self.mended is None else self.mended

    def take(self) -> str:
        """What has not gone out yet."""
        new = self.text[self.num_out :]
        self.num_out += len(new)
        return new


class Translator:
    """Translates the segments of one text."""

    def __init__(
        self,
        model: BaseChatModel,
        wish: Wish,
        options: Mapping[str, Any],
        config: RunnableConfig,
        *,
        measure: Measure,
        total: int,
        is_streamed: bool,
    ) -> None:
        """Begin.

        Args:
            model: Any chat model.
            wish: What is asked for.
            options: Call arguments for the model; `max_tokens` and `stop` are for each segment: what they
                cut off is told.
            config: Of the run that this is part of.
            measure: The model's.
            total: Characters of the text.
            is_streamed: Whether somebody reads the translation as it comes.
        """
        self._model = model
        self._wish = wish
        self._options = options
        self._config = config
        self._count = measure.count
        self._total = total
        self._is_streamed = is_streamed

    async def translate(self, segment: Segment, its_turn: asyncio.Event) -> AsyncGenerator[str | SegmentReport]:
        """Yield the translation, as it comes once it is its turn, and then what there is to tell of it.

        What has gone out cannot be taken back. So what has something in it that must stay is held until it was looked
        at, and so is what begins as its source does, and what comes after a mark that the source does not have.
        """
        if segment.lead:
            yield segment.lead
        if not segment.words:
            yield self._report(segment, Attempt(""), "kept")
            return
        attempt = Attempt(segment.words, self._options.get("stop", ()))
        may_flow = self._is_streamed and not segment.is_line and all(not part.is_fixed for part in finer(segment.words))
        # An answer that is too short for a copy of all is no copy, but cut off, and not tried again.
        may_be_copy = self._options.get("max_tokens", math.inf) >= self._count(segment.words)
        name = f"segment {segment.index + 1}"
        async with aclosing(self._ask(segment.words, name, before=segment.before, after=segment.after)) as chunks:
            async for chunk in chunks:
                attempt.add(chunk)
                is_held = (may_be_copy and attempt.is_copy) or attempt.has_new_marks
                if may_flow and its_turn.is_set() and not is_held:
                    yield attempt.take()
        attempt.problems = await run_cancellable(self._problems, attempt, is_line=segment.is_line)
        status: Literal["translated", "mended", "faulty"] = "faulty" if attempt.problems else "translated"
        is_short_as_asked = attempt.stop_reason is not None or (
            attempt.finish_reason == "length" and "max_tokens" in self._options
        )
        if attempt.problems and not attempt.num_out and not is_short_as_asked:
            first = attempt
            async with aclosing(self._again(segment, first, name)) as growing:
                async for attempt in growing:
                    yield attempt.take()
            status = "faulty" if attempt.problems else "mended"
        yield attempt.take()
        attempt.problems += self._missed_terms(attempt)
        yield self._report(segment, attempt, status)

    async def _again(self, segment: Segment, first: Attempt, name: str) -> AsyncGenerator[Attempt]:
        """Translate the words in smaller pieces: around what must stay, or else in halves. What cannot be had stays.

        Yields the second attempt after each piece: what there is of it then will not change.
        """
        pieces = finer(segment.words)
        if len(pieces) == 1:
            less = max(MIN_PIECE, self._count(segment.words) * 2 // 3)
            pieces = [Part(piece, is_fixed=False) for piece in cut(segment.words, budget=less, count=self._count)]
        second = Attempt(segment.words, usage=first.usage, finish_reason=first.finish_reason)
        mended, finish_reasons = "", []
        for index, piece in enumerate(pieces):
            words = piece.text.strip()
            if piece.is_fixed or not any(map(str.isalpha, words)):
                mended += piece.text
                continue
            attempt = Attempt(words, self._options.get("stop", ()))
            async with aclosing(self._ask(words, f"{name}, again {index + 1}", times=2)) as chunks:
                async for chunk in chunks:
                    attempt.add(chunk)
            is_line = segment.is_line or (len(pieces) > 1 and "\n" not in words)
            problems = await run_cancellable(self._problems, attempt, is_line=is_line)
            is_of_use = not problems or (attempt.is_cut_off and attempt.text)
            before, _, after = piece.text.partition(words)
            mended += before + (attempt.text if is_of_use else words) + after
            second.problems += problems
            if attempt.usage:
                second.usage = add_usage(second.usage, attempt.usage)
            finish_reasons.append(attempt.finish_reason)
            second.mended = mended
            yield second
        if finish_reasons:
            second.finish_reason = "length" if "length" in finish_reasons else finish_reasons[-1]
        second.mended = mended
        await run_cancellable(self._add_faults, second, segment)
        yield second

    def _add_faults(self, second: Attempt, segment: Segment) -> None:
        if not second.problems and self._is_untranslated(segment.words, second.mended or ""):
            second.problems.append(UNTRANSLATED)
        second.problems += faults(segment.words, second.text, is_line=segment.is_line)

    def _ask(
        self, words: str, name: str, *, before: str = "", after: str = "", times: int = 1
    ) -> AsyncGenerator[AIMessageChunk]:
        most = {"max_tokens": self._wish.answer_tokens(self._count(words), times=times)}
        return self._model.astream(  # type: ignore[return-value]
            self._wish.messages(words, before, after),
            patch_config(self._config, run_name=name),
            **{**most, **self._options},
        )

    def _problems(self, attempt: Attempt, *, is_line: bool) -> list[str]:
        words, text = attempt.words, attempt.text
        if attempt.stop_reason is not None:
            return [f"the answer was cut off at “{attempt.stop_reason}”"]
        if not text:
            return ["the answer was empty"]
        if attempt.finish_reason == "length":
            return ["the answer was cut off at its greatest length"]
        if self._is_untranslated(words, text):
            return [UNTRANSLATED]
        return faults(words, text, is_line=is_line)

    def _is_untranslated(self, words: str, text: str) -> bool:
        if folded(words) == folded(text):
            return len(words.split()) >= MANY_WORDS or len(words) >= LONG  # a name is the same in any language
        source, target = self._wish.source, self._wish.target
        if source is None:
            return False
        return is_written_in(text, target) is False and is_written_in(text, source) is True

    def _missed_terms(self, attempt: Attempt) -> list[str]:
        said = folded(attempt.text)
        terms = self._wish.terms_in(attempt.words)
        return [f"“{term}” is not “{wanted}”" for term, wanted in terms.items() if folded(wanted) not in said]

    def _report(
        self, segment: Segment, attempt: Attempt, status: Literal["kept", "translated", "mended", "faulty"]
    ) -> SegmentReport:
        return SegmentReport(
            index=segment.index,
            source=segment.source,
            target=segment.lead + attempt.text,
            status=status,
            problems=attempt.problems,
            finish_reason=attempt.finish_reason,
            usage=attempt.usage,
            done=segment.end,
            total=self._total,
        )


UNTRANSLATED = "it came back untranslated"
MARKS = frozenset("`*#|<>[]{}$%\\~=")
# A line break with the white space around it; only from where that begins, or each place in it would be tried.
LINE_END = re.compile(r"(?<!\s)[^\S\n]*+\n\s*+")
PARAGRAPH_END = re.compile(r"\n[^\S\n]*+\n\s*+")
ITEM = re.compile(r"(?:[-+]|\d{1,9}[.)])(?:\s|$)|\d{1,9}$")
"""What a list's item begins with, or may."""

MANY_WORDS = 4
LONG = 24
"""Words, and characters, from which on what is equal to its source is no translation of it."""
