from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, SystemMessage

from llm import ChatLLaMA3, LLaMA3_LLM, LocalEngine, ScriptedEngine, chat_llama3
from llm.caller import Caller, current_caller
from llm.errors import ContextOverflow, EngineLoading, InvalidMessage, InvalidOption
from llm.prompt import encode, encode_text

MESSAGES = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Hello!"), HumanMessage("How are you?")]


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(lambda message: f"You said: {message}")
    engine.wait_until_ready(30)
    yield engine
    engine.close()


@pytest.fixture
def model(engine: ScriptedEngine) -> ChatLLaMA3:
    return ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))


def test_the_answer_is_an_ai_message_with_usage_and_metadata(model: ChatLLaMA3, engine: ScriptedEngine) -> None:
    answer = model.invoke(MESSAGES)

    assert isinstance(answer, AIMessage)
    assert answer.content == "You said: How are you?"
    num_prompt = len(encode(engine.checkpoint.tokenizer, MESSAGES))
    num_answer = len("You said: How are you?") + 1  # and the end of the turn
    assert answer.usage_metadata == {
        "input_tokens": num_prompt,
        "output_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "input_token_details": {"cache_read": 0},
    }
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.response_metadata["model_name"] == "scripted"


async def test_a_stream_adds_up_to_the_answer_and_tells_usage_once(model: ChatLLaMA3) -> None:
    chunks = [chunk async for chunk in model.astream(MESSAGES)]

    whole = sum(chunks[1:], chunks[0])
    answer = await model.ainvoke(MESSAGES)
    assert isinstance(whole, AIMessageChunk)
    assert whole.content == answer.content
    assert whole.usage_metadata == answer.usage_metadata
    assert whole.response_metadata == answer.response_metadata
    assert sum(chunk.usage_metadata is not None for chunk in chunks) == 1
    assert chunks[-1].chunk_position == "last"


def test_the_whole_conversation_reaches_the_model(model: ChatLLaMA3, engine: ScriptedEngine) -> None:
    model.invoke(MESSAGES)

    (prompt,) = engine.prompts
    assert [text in prompt for text in ("Be brief.", "Hi", "Hello!", "How are you?")] == [True] * 4


def test_options_come_from_the_call_then_the_model_then_the_llm(engine: ScriptedEngine) -> None:
    llm = LLaMA3_LLM(engine=engine, max_tokens=8)

    assert ChatLLaMA3(llm=llm).invoke("Hi").content == "You said"
    assert ChatLLaMA3(llm=llm, max_tokens=5).invoke("Hi").content == "You s"
    assert ChatLLaMA3(llm=llm, max_tokens=5).invoke("Hi", max_tokens=3).content == "You"
    assert ChatLLaMA3(llm=llm).bind(max_tokens=3).invoke("Hi").content == "You"


def test_max_tokens_that_nobody_gave_is_what_room_is_left() -> None:
    engine = ScriptedEngine("a" * 10_000, context=1000)
    engine.wait_until_ready(30)

    answer = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine)).invoke("Hi")

    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] == 1000
    assert answer.response_metadata["finish_reason"] == "length"
    engine.close()


def test_the_checkpoints_own_defaults_come_before_those_of_the_llm(tiny_llama3: Path, tmp_path: Path) -> None:
    import json
    import shutil

    directory = shutil.copytree(tiny_llama3, tmp_path / "model")
    (directory / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 0.6, "top_p": 0.8, "eos_token_id": [128001, 128009]})
    )
    engine = LocalEngine(str(directory))
    engine.wait_until_ready(60)
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))

    sampling = model._request([HumanMessage("Hi")], None, {}).sampling
    explicit = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine, temperature=0.1))._request([HumanMessage("Hi")], None, {})

    assert (sampling.temperature, sampling.top_p, sampling.repetition_penalty) == (0.6, 0.8, 1.0)
    assert (explicit.sampling.temperature, explicit.sampling.top_p) == (0.1, 0.8)
    engine.close()


def test_a_chains_own_words_are_no_secret_and_all_else_is(model: ChatLLaMA3) -> None:
    own = SystemMessage("Be brief. Name: Anna", additional_kwargs={"shared_chars": len("Be brief.")})

    requests = [model._request([first, HumanMessage("Hi")], None, {}) for first in (own, SystemMessage(own.text))]

    tokenizer = model.llm.engine.checkpoint.tokenizer
    shared = [tokenizer.decode(list(request.prompt[: request.num_shared])) for request in requests]
    assert shared == ["<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.", ""]


def test_stop_is_honoured_as_argument_as_default_and_bound(engine: ScriptedEngine) -> None:
    llm = LLaMA3_LLM(engine=engine)

    assert ChatLLaMA3(llm=llm).invoke("one two", stop=["two"]).content == "You said: one "
    assert ChatLLaMA3(llm=llm, stop=["one"]).invoke("one two").content == "You said: "
    assert ChatLLaMA3(llm=llm).bind(stop=["said"]).invoke("one").content == "You "


@pytest.mark.parametrize(("stops", "told"), [([], None), (["never"], None), (["never", "two"], "two")])
async def test_the_stop_string_that_ended_an_answer_is_told(
    model: ChatLLaMA3, stops: list[str], told: str | None
) -> None:
    streamed = [chunk async for chunk in model.astream("one two", stop=stops)]
    for answer in (await model.ainvoke("one two", stop=stops), sum(streamed[1:], streamed[0])):
        assert answer.response_metadata["finish_reason"] == "stop"
        assert answer.response_metadata.get("stop_reason") == told


def test_logprobs_are_told_in_openais_shape(model: ChatLLaMA3) -> None:
    answer = model.invoke("Hi", logprobs=1, max_tokens=3)

    content = answer.response_metadata["logprobs"]["content"]
    assert [item["token"] for item in content] == ["Y", "o", "u"]
    assert all(item["logprob"] == 0 for item in content)


def test_tokens_are_counted_as_the_model_sees_them(model: ChatLLaMA3, engine: ScriptedEngine) -> None:
    assert model.get_num_tokens_from_messages(MESSAGES) == len(encode(engine.checkpoint.tokenizer, MESSAGES))
    assert model.get_num_tokens("Grüße") == 7


def test_the_profile_tells_the_context(model: ChatLLaMA3) -> None:
    assert model.profile is not None
    assert model.profile["max_input_tokens"] == 8192


def test_the_profile_is_there_once_the_model_has_loaded() -> None:
    engine = ScriptedEngine(load_delay_s=0.1)
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    assert model.profile is None
    with pytest.raises(EngineLoading):
        model.get_num_tokens_from_messages(MESSAGES)
    engine.wait_until_ready(30)

    model.get_num_tokens_from_messages(MESSAGES)

    assert model.profile is not None
    engine.close()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"temperature": 9}, InvalidOption),
        ({"top_k": 10**6}, InvalidOption),
        ({"nonsense": 1}, InvalidOption),
        ({"grammar": "root ::= 'a'"}, InvalidOption),
        ({"max_tokens": 9000}, ContextOverflow),
    ],
)
def test_checking_a_call_raises_what_the_call_would_raise(
    model: ChatLLaMA3, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        model.check(MESSAGES, **options)
    with pytest.raises(error):
        model.invoke(MESSAGES, **options)


def test_checking_a_call_counts_its_prompt(model: ChatLLaMA3, engine: ScriptedEngine) -> None:
    assert model.check(MESSAGES, max_tokens=5) == len(encode(engine.checkpoint.tokenizer, MESSAGES))
    assert engine.prompts == []


def test_checking_a_call_and_making_it_go_by_the_callers_limit(model: ChatLLaMA3, engine: ScriptedEngine) -> None:
    token = current_caller.set(Caller(max_output_tokens=3))
    try:
        assert model.check(MESSAGES, max_tokens=50) == len(encode(engine.checkpoint.tokenizer, MESSAGES))
        answer = model.invoke(MESSAGES, max_tokens=50)
    finally:
        current_caller.reset(token)

    assert answer.usage_metadata is not None
    assert answer.usage_metadata["output_tokens"] == 3
    assert answer.response_metadata["finish_reason"] == "length"


def test_an_image_is_refused(model: ChatLLaMA3) -> None:
    with pytest.raises(InvalidMessage):
        model.invoke([HumanMessage([{"type": "image_url", "image_url": {"url": "data:,"}}])])


def test_what_it_does_not_have_is_refused_when_it_is_built(engine: ScriptedEngine) -> None:
    with pytest.raises(TypeError, match="presence_penalty"):
        ChatLLaMA3(llm=LLaMA3_LLM(engine=engine), presence_penalty=1)
    with pytest.raises(InvalidOption, match="top_p"):
        ChatLLaMA3(llm=LLaMA3_LLM(engine=engine), top_p=2)


def test_a_prompt_that_is_far_too_long_is_refused_without_encoding_all_of_it(
    model: ChatLLaMA3, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_encoded = 0

    def counted(tokenizer: Any, text: str) -> list[int]:
        nonlocal num_encoded
        num_encoded += len(text)
        return encode_text(tokenizer, text)

    monkeypatch.setattr(chat_llama3, "encode_text", counted)
    with pytest.raises(ContextOverflow, match="has more than"):
        model.check([HumanMessage("word " * 200_000)])
    assert num_encoded < 500_000
