"""What is measured of documents: how much, and what came of it. Times are seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from tests.bench.documents_client import Begun, Streamed
from tests.bench.figures import percentile

STEPS = ("long", "scale", "first", "chat", "obeyed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured. Pages have 500 words."""

    pages: float = 30
    """Of the long document, which is the real one."""
    passes: int = 1
    """How often it is translated."""
    streamed_pages: float = 5
    """Of it, by the plain stream besides."""
    translate_pages: tuple[float, ...] = (2.5, 5, 10, 20)
    summarize_pages: tuple[float, ...] = (5, 10, 20, 40)
    first_pages: tuple[float, float] = (2, 200)
    """A short document and a long one, to compare the time to the first words."""
    repeats: int = 7
    """Of that."""
    rounds: int = 2
    chats: int = 20
    """In each round, beside nothing, plain streams and a translation."""
    each: int = 30
    """Small texts for each thing that a model may obey."""


QUICK = Plan(
    pages=0.3,
    streamed_pages=0.1,
    translate_pages=(0.2, 0.4),
    summarize_pages=(0.5, 5),
    first_pages=(0.2, 2),
    repeats=1,
    rounds=1,
    chats=2,
    each=2,
)


@dataclass(frozen=True, slots=True)
class Translated:
    """What became of a document that was translated, over a stream of events."""

    pages: float
    wall_s: float
    first_words_s: float
    segments: int
    calls: int
    """Of the model, second tries included."""
    statuses: Mapping[str, int]
    problems: Mapping[str, int]
    prompt_tokens: int
    output_tokens: int
    """Of all tries."""
    is_whole: bool
    """All sources together are the text, all targets the output, and the pieces that were streamed as well."""
    is_in_order: bool
    """Progress only went on, to the end."""
    event_bytes: int
    mean_running: float
    """Slots in use."""
    memory_bytes: tuple[int, ...]
    """Of the server: before, after a quarter, a half, three quarters of the time, at the end."""
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Summarized:
    """What became of a document that was summarized, over a stream of events."""

    pages: float
    wall_s: float
    parts_s: float
    """Until all parts had been summarized, and the final summary began."""
    first_words_s: float
    stages: Sequence[tuple[str, int]]
    """How many summaries each stage made."""
    num_parts: int
    num_words: int
    finish_reason: str
    problems: Mapping[str, int]
    """Without their numbers."""
    prompt_tokens: int
    output_tokens: int
    is_in_order: bool
    """Progress of each stage went on one by one, to the stage's end."""
    mean_running: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class FirstWords:
    """How long one waits for the first words of a short and of a long document, and until all is free again once the
    connection is closed after them."""

    engine: str
    short: tuple[Begun, ...]
    long: tuple[Begun, ...]

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return median(each.first_words_s for each in self.long) / median(each.first_words_s for each in self.short)


@dataclass(frozen=True, slots=True)
class Chats:
    """The time to the first words of short chats, one after the other, beside something."""

    beside: str
    first_s: tuple[float, ...]
    mean_running: float
    """Slots in use when a chat was asked for, its own not counted."""
    max_waiting: int
    freed_s: float
    """From when those beside were cut off until the engine had nothing to do."""

    @property
    def p95_s(self) -> float:
        """Of the times."""
        return percentile(self.first_s, 95) or 0.0


@dataclass(frozen=True, slots=True)
class Obeyed:
    """How often the model did what it was asked for."""

    asked: str
    tried: int
    at_once: int
    after_mending: int = 0
    told: int = 0
    """Of the others, how many say what is wrong."""
    note: str = ""


@dataclass(slots=True)
class Found:
    """All that was measured."""

    translated: list[Translated] = field(default_factory=list)
    """The long document, once for each pass."""
    streamed: Streamed | None = None
    """The first of its pages by the plain stream."""
    streamed_pages: float = 0
    summarized: list[Summarized] = field(default_factory=list)
    translated_by_pages: list[Translated] = field(default_factory=list)
    summarized_by_pages: list[Summarized] = field(default_factory=list)
    first: list[FirstWords] = field(default_factory=list)
    chats: list[Chats] = field(default_factory=list)
    obeyed: list[Obeyed] = field(default_factory=list)
