from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from pydantic import ConfigDict, TypeAdapter, ValidationError

from chains.options import SAMPLING_OPTIONS, with_options
from llm.errors import InvalidOption
from llm.sampling import OPTIONS, Sampling

EDGES: dict[str, list[Any]] = {
    "temperature": [-0.001, 0, 0.0, 1, 2, 2.0, 2.001, 1e9, float("nan"), float("inf"), "1", True],
    "top_p": [-1, 0, 0.001, 1, 1.001, float("nan"), float("-inf"), "1", False],
    "top_k": [-1, 0, 1, 10**6, 1.5, 1.0, "1", True],
    "min_p": [-0.001, 0, 1, 1.001, float("nan"), "1"],
    "max_tokens": [-1, 0, 1, 10**9, 1.5, "1", True],
    "repetition_penalty": [0, 0.009, 0.01, 1, 2, 2.001, float("nan"), float("inf"), "1"],
    "seed": [-1, 0, 2**63 - 1, 2**63, 1.5, "1", True],
    "stop": [
        [],
        ["a"],
        ["a"] * 8,
        ["a"] * 9,
        [""],
        ["a", ""],
        "a",
        [1],
        [None],
        {"a": 1},
        ["a" * 1000],
        ["a", "a" * 1001],
    ],
}


class Recorder(FakeListChatModel):
    """Any chat model that takes call arguments; keeps them."""

    model_config = ConfigDict(extra="allow")

    def _generate(self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> Any:
        self.given = {"stop": stop, **kwargs}
        result: ChatResult = super()._generate(messages, stop, run_manager, **kwargs)
        return result


def is_an_option(name: str, value: Any) -> bool:
    (annotation,) = [spec.annotation for spec in SAMPLING_OPTIONS if spec.id == name]
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def is_sampling(name: str, value: Any) -> bool:
    try:
        Sampling.of({name: value})
    except InvalidOption:
        return False
    return True


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in EDGES.items() for value in values])
def test_an_option_is_taken_exactly_where_the_model_takes_it(name: str, value: Any) -> None:
    assert is_an_option(name, value) == is_sampling(name, value)


def test_every_option_is_the_models_and_is_tried_at_its_edges() -> None:
    names = [spec.id for spec in SAMPLING_OPTIONS]
    assert set(names) == set(EDGES)
    assert set(OPTIONS) - set(names) == {"logprobs", "grammar"}


def test_options_reach_the_model_as_call_arguments_over_the_chains_own() -> None:
    model = Recorder(responses=["Hi!"])
    chain = with_options(model, temperature=0.0, repetition_penalty=1.0)
    chain.invoke("Hi!")
    assert model.given == {"stop": None, "temperature": 0.0, "repetition_penalty": 1.0}
    chain.invoke("Hi!", {"configurable": {"temperature": 1.5, "stop": ["a"], "thread_id": "one", "seed": None}})
    assert model.given == {"stop": ["a"], "temperature": 1.5, "repetition_penalty": 1.0}


async def test_options_reach_the_model_by_every_verb() -> None:
    model = Recorder(responses=["Hi!"])
    chain = with_options(model)
    config: Any = {"configurable": {"seed": 7}}
    await chain.ainvoke("Hi!", config)
    assert model.given["seed"] == 7
    chain.batch(["Hi!"], {"configurable": {"seed": 8}})
    assert model.given["seed"] == 8
    await chain.abatch(["Hi!"], {"configurable": {"seed": 9}})
    assert model.given["seed"] == 9


def test_a_bound_argument_still_works() -> None:
    model = Recorder(responses=["Hi!"])
    with_options(model).bind(seed=3).invoke("Hi!", {"configurable": {"top_k": 5}})
    assert model.given == {"stop": None, "seed": 3, "top_k": 5}


def test_the_form_shows_a_chains_own_defaults() -> None:
    chain = with_options(FakeListChatModel(responses=[]), temperature=0.0)
    defaults = {spec.id: spec.default for spec in chain.config_specs}
    assert defaults["temperature"] == 0.0
    assert defaults["top_p"] is None
