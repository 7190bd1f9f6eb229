"""Counting a JSON text before it is parsed: what comes out is what the parsed value has."""

import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.entry.json_structure import StructureCounter

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=40,
)


def num_values(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + sum(map(num_values, value.values()))
    return 1 + sum(map(num_values, value)) if isinstance(value, list) else 1


def depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


def counted(content: bytes, size: int) -> StructureCounter:
    counter = StructureCounter()
    for start in range(0, len(content), size):
        counter.feed(content[start : start + size])
    return counter


@settings(max_examples=50)
@given(VALUES, st.integers(1, 50), st.booleans(), st.sampled_from([None, 1, "\t"]))
@example("\\", 1, True, None)
@example(['\\"', "\\\\", '"[{,', []], 1, False, None)
@example({"a": {}, "b": [[]], "": ""}, 2, True, 1)
def test_the_counts_are_those_of_the_parsed_value_however_the_text_is_split(
    value: Any, size: int, is_ascii: bool, indent: int | str | None
) -> None:
    content = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode("utf-8", "surrogatepass")
    counter = counted(content, size)
    assert counter.num_values == num_values(value)
    assert counter.max_depth == depth(value)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_of_a_run_of_backslashes_every_other_one_escapes(count: int) -> None:
    text = "\\" * count + '",'
    for size in (1, 2, 3, 1000):
        assert counted(json.dumps([text, 1]).encode(), size).num_values == 3


def test_empty_containers_count_as_one_value_each() -> None:
    assert counted(b"[ [ ] , {\n} ]", 3).num_values == 3
    assert counted(b"[]", 1).num_values == 1


def test_the_depth_is_that_of_the_deepest_place_and_closed_ones_do_not_count() -> None:
    assert counted(b"[[[]],[],{}]", 2).max_depth == 3
