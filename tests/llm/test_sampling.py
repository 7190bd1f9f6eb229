import math
from typing import Any

import pytest

from llm.errors import InvalidOption
from llm.sampling import MAX_SEED, MAX_STOP_CHARS, OPTIONS, Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.009),
        ("temperature", 10**400),
        ("repetition_penalty", 2.1),
        ("seed", -1),
        ("seed", MAX_SEED + 1),
        ("stop", ("",)),
        ("stop", ("a",) * 9),
        ("stop", "a"),
        ("stop", (1,)),
        ("logprobs", 21),
        ("grammar", "root ::= 'a'"),
    ],
)
def test_an_option_out_of_its_bounds_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=f"^{name} must be ") as caught:
        Sampling(**{name: value})

    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 1),
        ("top_k", 0),
        ("min_p", 0),
        ("min_p", 1),
        ("repetition_penalty", 0.01),
        ("repetition_penalty", 2),
        ("seed", 0),
        ("seed", MAX_SEED),
        ("stop", ("a",) * 8),
        ("stop", ("a" * MAX_STOP_CHARS,) * 8),
        ("logprobs", 0),
        ("logprobs", 20),
    ],
)
def test_an_option_at_its_bounds_is_taken(name: str, value: Any) -> None:
    assert getattr(Sampling(**{name: value}), name) == value


def test_a_stop_string_that_is_too_long_is_named_with_its_length() -> None:
    with pytest.raises(InvalidOption, match=r"^stop\[1\] must be at most 1000 characters, got '1001 characters'"):
        Sampling(stop=("a", "b" * (MAX_STOP_CHARS + 1)))


def test_call_arguments_that_are_none_are_not_given() -> None:
    assert Sampling.of(dict.fromkeys(OPTIONS)) == Sampling()


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InvalidOption, match="presence_penalty must be one of max_tokens"):
        Sampling.of({"presence_penalty": 1})
