"""How the next token is chosen: one request's sampling options, checked. Knows no torch and no model."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from llm.errors import InvalidOption

MAX_STOPS = 8
MAX_STOP_CHARS = 1_000
"""Of one stop string: far more than a marker or a line has, and as much of an answer may be held back."""
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The options of one request. Names, meaning and order of application are those of transformers' `generate`.

    Raises `InvalidOption` on construction; `top_k` and `max_tokens` are checked against the model when it is known.
    """

    max_tokens: int | None = None
    """New tokens at most. None: what room is left in the context."""
    temperature: float = 1.0
    """0 is greedy: the likeliest token, always."""
    top_p: float = 1.0
    """Keep the likeliest tokens whose probabilities add up to this."""
    top_k: int = 0
    """Keep this many of the likeliest tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens that are at least this fraction as likely as the likeliest."""
    repetition_penalty: float = 1.0
    """Logits of tokens already in prompt or answer are divided by this if positive, else multiplied
    (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: int | None = None
    """Same seed, prompt and options: same answer. None: different each time."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these, at most 8 of at most 1,000 characters; they are never sent, not even
    in part."""
    logprobs: int | None = None
    """Report each token's log-probability and those of this many alternatives."""
    grammar: str | None = None
    """Reserved: refused."""

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, 1, None, optional=True)
        _check_float("temperature", self.temperature, 0.0, 2.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, above=True)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 2.0)
        _check_int("seed", self.seed, 0, MAX_SEED, optional=True)
        _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, optional=True)
        _check_stop(self.stop)
        if self.grammar is not None:
            raise InvalidOption("grammar", "absent (constrained generation is not supported)", self.grammar)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Self:
        """Build from call arguments: None means not given, `stop` may be any sequence. Unknown names are refused."""
        for name, value in options.items():
            if name not in OPTIONS:
                raise InvalidOption(name, f"one of {', '.join(OPTIONS)}", value)
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(given.get("stop"), list):
            given["stop"] = tuple(given["stop"])
        return cls(**given)

    @property
    def is_greedy(self) -> bool:
        """True if the likeliest token is always taken."""
        return self.temperature == 0


OPTIONS = tuple(field.name for field in fields(Sampling))
"""The names of all options, in order."""


def options_of(holder: object) -> dict[str, Any]:
    """The options that an object has as attributes, less those that are None."""
    return {name: value for name in OPTIONS if (value := getattr(holder, name, None)) is not None}


def _check_int(name: str, value: object, low: int, high: int | None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    limit = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise InvalidOption(name, limit, value)


def _check_float(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    limit = f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):  # type: ignore[operator]  # NaN fails
        raise InvalidOption(name, limit, value)


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(item, str) for item in stop):
        raise InvalidOption("stop", "a list of strings", stop)
    if len(stop) > MAX_STOPS:
        raise InvalidOption("stop", f"at most {MAX_STOPS} strings", f"{len(stop)} strings")
    for index, item in enumerate(stop):
        if len(item) > MAX_STOP_CHARS:
            raise InvalidOption(f"stop[{index}]", f"at most {MAX_STOP_CHARS} characters", f"{len(item)} characters")
    if "" in stop:
        raise InvalidOption("stop", "non-empty strings", list(stop))
