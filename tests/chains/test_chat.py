"""A chat that outgrows the context: what the model is shown, what its answer says of that, and what is refused."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.language_models import BaseChatModel, FakeListChatModel, GenericFakeChatModel
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    HumanMessage,
    SystemMessage,
    ToolMessage,
)
from pydantic import TypeAdapter, ValidationError

from chains import Chain, chat
from chains.conversation import trim
from chains.documents.measure import ANSWER_TOKENS, WINDOW, Measure
from chains.errors import InputError
from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from llm.errors import ContextOverflow

CONTEXT = 1000
KINDS = (HumanMessage, AIMessage, SystemMessage, ToolMessage)


def message(kind: type[BaseMessage], text: str) -> BaseMessage:
    return ToolMessage(text, tool_call_id="1") if kind is ToolMessage else kind(content=text)


def talk(num_messages: int, length: int = 20) -> list[BaseMessage]:
    """A conversation that says in each message which one it is, and ends with a human's if their number is odd."""
    return [(AIMessage if i % 2 else HumanMessage)(f"{i:05} ".ljust(length, ".")) for i in range(num_messages)]


def count(messages: Sequence[BaseMessage]) -> int:
    """A template that takes 5 tokens, and 3 for each message."""
    return 5 + sum(3 + len(message.text) for message in messages)


def count_roughly(messages: Sequence[BaseMessage]) -> int:
    """Where a whole is more than its parts."""
    return 5 + sum(3 + len(message.text) for message in messages) * (10 + len(messages)) // 10


def last_turn(messages: list[BaseMessage]) -> list[BaseMessage]:
    humans = [i for i, message in enumerate(messages) if isinstance(message, HumanMessage)]
    return messages[humans[-1] if humans else 0 :]


def systems(messages: list[BaseMessage]) -> list[BaseMessage]:
    return [message for message in messages if isinstance(message, SystemMessage)]


def numbered(messages: list[BaseMessage]) -> list[int]:
    return [id(message) for message in messages]


conversations = st.lists(
    st.builds(message, st.sampled_from(KINDS), st.integers(0, 40).map(lambda length: "x" * length)),
    min_size=1,
    max_size=40,
)
counts = st.sampled_from([count, count_roughly])


@given(conversations, st.integers(-10, 800), counts)
@settings(max_examples=500, deadline=None)
def test_system_messages_and_the_last_turn_always_stay_and_order_is_kept(
    messages: list[BaseMessage], room: int, count: Any
) -> None:
    kept = numbered(trim(messages, room, count))

    assert kept == [number for number in numbered(messages) if number in kept]
    assert set(numbered(systems(messages) + last_turn(messages))) <= set(kept)


@given(conversations, st.integers(-10, 800), counts)
@settings(max_examples=500, deadline=None)
def test_the_oldest_turns_go_whole(messages: list[BaseMessage], room: int, count: Any) -> None:
    kept = trim(messages, room, count)

    said = [message for message in messages if not isinstance(message, SystemMessage)]
    still_said = [message for message in kept if not isinstance(message, SystemMessage)]
    assert numbered(said[len(said) - len(still_said) :]) == numbered(still_said)
    if len(still_said) < len(said):
        assert isinstance(still_said[0], HumanMessage)


@given(conversations, st.integers(-10, 800), counts)
@settings(max_examples=500, deadline=None)
def test_what_is_kept_fits_unless_nothing_more_may_go(messages: list[BaseMessage], room: int, count: Any) -> None:
    kept = trim(messages, room, count)

    least = set(numbered(systems(messages) + last_turn(messages)))
    assert count(kept) <= room or set(numbered(kept)) == least
    if count(messages) <= room:
        assert kept == messages


@given(conversations, st.integers(1, 800))
@settings(max_examples=500, deadline=None)
def test_hardly_more_goes_than_has_to(messages: list[BaseMessage], room: int) -> None:
    """Either one turn less would have been too few, or it is less than half of the room that is left empty."""
    kept = trim(messages, room, count)

    if len(kept) < len(messages):
        left_out = [message for message in messages if id(message) not in numbered(kept)]
        last = last_turn(left_out)
        one_turn_more = [message for message in messages if id(message) in numbered(kept + last)]
        assert count(one_turn_more) > room or room - count(kept) <= 2 * max(room // 4, 1)


def test_the_prompt_begins_the_same_for_many_turns_so_that_it_need_not_be_read_again() -> None:
    turns = 300
    firsts = [trim(talk(2 * i + 1), CONTEXT, count)[0].text for i in range(turns)]

    num_cuts = sum(a != b for a, b in pairwise(firsts))

    num_steps = turns * 2 * 23 / (CONTEXT // 4)
    assert 0 < num_cuts <= num_steps < turns / 5


def test_a_long_turn_does_not_go_just_because_a_step_ends_in_it() -> None:
    last = [HumanMessage("x" * 800), AIMessage("x" * 100), HumanMessage("?")]

    kept = trim([*talk(8), *last], CONTEXT, count)

    assert kept == last


def test_a_long_last_message_leaves_something_of_what_came_before() -> None:
    messages = [*talk(20), HumanMessage("x" * 800)]

    kept = trim(messages, CONTEXT, count)

    assert len(kept) > 3
    assert kept[-1] is messages[-1]


@pytest.mark.parametrize(("num_messages", "length"), [(10_001, 100), (10_001, 5), (101, 10_000)])
def test_it_costs_one_count_of_everything_and_little_more(num_messages: int, length: int) -> None:
    messages = talk(num_messages, length)
    counted: list[int] = []

    def counting(messages: list[BaseMessage]) -> int:
        counted.append(count(messages))
        return counted[-1]

    trim(messages, 8192, counting)

    assert counted[0] == count(messages)
    assert sum(counted[1:]) < 4 * max(8192, 2 * length)


# The chain


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(lambda message: message.upper(), context=CONTEXT)
    engine.wait_until_ready()
    yield engine
    engine.close()


@pytest.fixture
def model(engine: ScriptedEngine) -> ChatLLaMA3:
    return ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))


@pytest.fixture
def chain(model: ChatLLaMA3) -> Chain:
    return chat.build(model)


def shown(engine: ScriptedEngine) -> list[str]:
    """The contents of the messages in the last prompt."""
    return [part.partition("<|end_header_id|>\n\n")[2] for part in engine.prompts[-1].split("<|eot_id|>")[:-1]]


def texts(messages: list[BaseMessage]) -> list[str]:
    return [message.text for message in messages]


def added(chunks: list[Any]) -> Any:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk
    return whole


async def ask(runnable: Any, verb: str, value: Any, config: Any = None) -> BaseMessage:
    """The whole answer."""
    match verb:
        case "invoke":
            answer = runnable.invoke(value, config)
        case "ainvoke":
            answer = await runnable.ainvoke(value, config)
        case "batch":
            answer = runnable.batch([value] * 2, config)[1]
        case "abatch":
            answer = (await runnable.abatch([value] * 2, config))[1]
        case "stream":
            answer = added(list(runnable.stream(value, config)))
        case "astream":
            answer = added([chunk async for chunk in runnable.astream(value, config)])
        case "transform":
            answer = added(list(runnable.transform(iter([value]), config)))
        case "astream_events":
            events = [event async for event in runnable.astream_events(value, config, version="v2")]
            root = events[0]["run_id"]
            (answer,) = [e["data"]["output"] for e in events if (e["event"], e["run_id"]) == ("on_chain_end", root)]
    assert isinstance(answer, BaseMessage)
    return answer


VERBS = ("invoke", "ainvoke", "batch", "abatch", "stream", "astream", "transform", "astream_events")


@pytest.mark.parametrize("verb", VERBS)
async def test_an_answer_says_how_many_messages_the_model_was_not_shown(
    engine: ScriptedEngine, chain: Chain, verb: str
) -> None:
    messages = [SystemMessage("Be brief."), *talk(51)]

    answer = await ask(chain.runnable, verb, {"messages": messages})

    seen = shown(engine)
    left_out = answer.response_metadata["messages_left_out"]
    assert 0 < left_out == len(messages) - len(seen)
    assert seen == ["Be brief.", *texts(messages[1 + left_out :])]
    assert answer.text == messages[-1].text.upper()
    assert answer.response_metadata["finish_reason"] == "stop"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("option", ["trim", "error"])
async def test_an_answer_to_a_conversation_that_fits_says_that_nothing_was_left_out(
    engine: ScriptedEngine, chain: Chain, verb: str, option: str
) -> None:
    answer = await ask(chain.runnable, verb, {"messages": talk(3)}, {"configurable": {"on_overflow": option}})

    assert answer.response_metadata["messages_left_out"] == 0
    assert shown(engine) == texts(talk(3))


@pytest.mark.filterwarnings("ignore:astream_log is deprecated")
async def test_the_stream_log_ends_with_the_number_too(chain: Chain) -> None:
    """The chat playground reads it."""
    logs = [log async for log in chain.runnable.astream_log({"messages": talk(51)}, diff=False)]

    final = logs[-1].state["final_output"]
    assert isinstance(final, AIMessageChunk)
    assert final.response_metadata["messages_left_out"] > 0


async def test_only_the_first_chunk_of_a_stream_says_the_number(chain: Chain) -> None:
    chunks = [chunk async for chunk in chain.runnable.astream({"messages": talk(51)})]

    assert all(isinstance(chunk, AIMessageChunk) for chunk in chunks)
    assert len(chunks) > 1
    first, *others = ["messages_left_out" in chunk.response_metadata for chunk in chunks]
    assert first
    assert not any(others)


async def test_an_answer_is_streamed_as_it_is_made() -> None:
    """The second word is asked for only after the first was delivered."""
    delivered: list[str] = []

    def script(_: str) -> Iterator[str]:
        yield "one "
        asked.wait(10)
        yield "two"

    asked = threading.Event()
    engine = ScriptedEngine(script)
    engine.wait_until_ready()
    runnable = chat.build(ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))).runnable
    async for chunk in runnable.astream({"messages": talk(1)}):
        delivered.append(chunk.text)
        if "".join(delivered) == "one ":
            asked.set()
    engine.close()
    assert asked.is_set()
    assert "".join(delivered) == "one two"


async def test_a_stream_that_is_closed_frees_the_engine() -> None:
    engine = ScriptedEngine("x" * 5000, token_delay_s=0.01)
    engine.wait_until_ready()
    runnable = chat.build(ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))).runnable
    stream = runnable.astream({"messages": talk(1)})
    await anext(stream)
    assert engine.health().running == 1
    await stream.aclose()  # type: ignore[attr-defined]
    for _ in range(500):
        if engine.health().running == 0:
            break
        await asyncio.sleep(0.01)
    assert engine.health().running == 0
    engine.close()


@pytest.fixture(scope="module")
def shared_engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine("Hi!", context=CONTEXT)
    engine.wait_until_ready()
    yield engine
    engine.close()


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 300)), min_size=1, max_size=20),
    st.fixed_dictionaries(
        {
            "max_tokens": st.none() | st.integers(1, CONTEXT),
            "system_prompt": st.none() | st.text("ab", max_size=100),
            "on_overflow": st.sampled_from(["trim", "error"]),
        }
    ),
)
@settings(max_examples=200, deadline=None)
def test_what_the_door_counts_is_what_the_model_is_shown_or_refuses(
    shared_engine: ScriptedEngine, lengths: list[tuple[type[BaseMessage], int]], options: dict[str, Any]
) -> None:
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=shared_engine))
    chain = chat.build(model)
    value = {"messages": [message(kind, "x" * length) for kind, length in lengths]}
    messages = chain.messages(value, options)

    try:
        num_tokens = model.check(messages, **chain.options(options))
    except ContextOverflow as refused:
        with pytest.raises(ContextOverflow, match=f"^{refused}$"):
            chain.runnable.invoke(value, {"configurable": options})
        return

    answer = chain.runnable.invoke(value, {"configurable": options})
    is_longer = bool(options["system_prompt"]) and not isinstance(value["messages"][0], SystemMessage)
    assert shown(shared_engine) == texts(messages)
    assert answer.usage_metadata["input_tokens"] == num_tokens
    assert answer.response_metadata["messages_left_out"] == len(value["messages"]) + is_longer - len(messages)


def test_nothing_is_left_out_if_that_is_wished_and_the_refusal_has_the_numbers(
    engine: ScriptedEngine, model: ChatLLaMA3, chain: Chain
) -> None:
    value, options = {"messages": talk(51)}, {"on_overflow": "error"}

    messages = chain.messages(value, options)

    assert messages == value["messages"]
    num_tokens = model.get_num_tokens_from_messages(messages)
    with pytest.raises(ContextOverflow, match=f"{num_tokens} tokens; the context holds {CONTEXT}"):
        model.check(messages, **chain.options(options))
    with pytest.raises(ContextOverflow, match=f"{num_tokens} tokens; the context holds {CONTEXT}"):
        chain.runnable.invoke(value, {"configurable": options})


@pytest.mark.parametrize("before", [0, 6])
def test_a_single_message_that_cannot_fit_is_refused_with_the_numbers(
    model: ChatLLaMA3, chain: Chain, before: int
) -> None:
    last = HumanMessage("x" * CONTEXT)
    value = {"messages": [SystemMessage("Be brief."), *talk(before), last]}

    num_tokens = model.get_num_tokens_from_messages([SystemMessage("Be brief."), last])
    with pytest.raises(ContextOverflow, match=f"{num_tokens} tokens; the context holds {CONTEXT}"):
        model.check(chain.messages(value, {}), **chain.options({}))
    with pytest.raises(ContextOverflow, match=f"{num_tokens} tokens; the context holds {CONTEXT}"):
        chain.runnable.invoke(value)


def test_a_last_message_that_leaves_little_room_is_answered_as_far_as_that_goes(
    engine: ScriptedEngine, chain: Chain
) -> None:
    last = HumanMessage("x" * 900)

    answer = chain.runnable.invoke({"messages": [*talk(4), last]})

    assert shown(engine) == [last.text]
    assert answer.response_metadata == {
        "finish_reason": "length",
        "model_name": "scripted",
        "messages_left_out": 4,
    }


@pytest.mark.parametrize(
    ("fields", "options", "room"),
    [
        ({}, {}, CONTEXT - CONTEXT // 4),
        ({}, {"max_tokens": 10}, CONTEXT - 10),
        ({}, {"max_tokens": 600}, CONTEXT - 600),
        ({"max_tokens": 300}, {}, CONTEXT - 300),
        ({"max_tokens": 300}, {"max_tokens": 10}, CONTEXT - 10),
    ],
)
def test_room_is_left_for_the_answer(
    engine: ScriptedEngine, fields: dict[str, Any], options: dict[str, Any], room: int
) -> None:
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine), **fields)

    for num_messages in range(1, 61, 2):
        messages = chat.build(model).messages({"messages": talk(num_messages)}, options)
        assert model.check(messages, **options) <= room
        assert len(messages) == num_messages or model.get_num_tokens_from_messages(talk(num_messages)) > room


def test_an_answer_has_a_thousand_tokens_where_there_are_many() -> None:
    model = Counting(profile={"max_input_tokens": 100_000}, responses=["Hi!"])

    fits = talk(3, (100_000 - ANSWER_TOKENS - count([])) // 3 - 3)
    too_long = [*fits[:-1], HumanMessage(fits[-1].text + "...")]

    assert chat.build(model).messages({"messages": fits}, {}) == fits
    assert chat.build(model).messages({"messages": too_long}, {}) == too_long[2:]


# Models of others


class Counting(FakeListChatModel):
    """A model of others that counts for itself, and remembers in which thread."""

    threads: list[threading.Thread] = []  # noqa: RUF012 (pydantic copies it)

    def get_num_tokens_from_messages(self, messages: Any, tools: Any = None) -> int:
        self.threads.append(threading.current_thread())
        return count(messages)


async def test_long_conversations_are_not_counted_on_the_event_loop() -> None:
    model = Counting(profile={"max_input_tokens": 200}, responses=["Hi!"])
    runnable = chat.build(model).runnable

    for verb in ("ainvoke", "abatch", "astream", "astream_events"):
        answer = await ask(runnable, verb, {"messages": talk(51)})
        assert answer.response_metadata["messages_left_out"] > 0

    assert model.threads
    assert threading.current_thread() not in model.threads


@pytest.mark.parametrize(
    "model",
    [
        FakeListChatModel(responses=["Hi!"]),
        FakeListChatModel(responses=["Hi!"], profile={"tool_calling": False}),
        GenericFakeChatModel(messages=iter([AIMessage("Hi!")] * 9)),
    ],
)
async def test_nothing_is_left_out_for_a_model_of_which_nobody_knows_how_much_it_can_hold(
    model: BaseChatModel,
) -> None:
    """Nor is anything counted: LangChain's own way would ask a hub for a tokenizer."""
    chain = chat.build(model)

    for verb in ("invoke", "astream"):
        answer = await ask(chain.runnable, verb, {"messages": talk(1001)})
        assert answer.response_metadata["messages_left_out"] == 0
        assert answer.text == "Hi!"
    assert len(chain.messages({"messages": talk(1001)}, {})) == 1001


def test_a_model_that_cannot_count_is_counted_for() -> None:
    model = FakeListChatModel(responses=["Hi!"], profile={"max_input_tokens": 200})

    answer = chat.build(model).runnable.invoke({"messages": talk(51)})

    assert answer.response_metadata["messages_left_out"] > 0


def test_a_model_that_gives_the_same_message_twice_gets_it_back_as_it_was() -> None:
    message = AIMessage("Hi!", response_metadata={"finish_reason": "stop"})
    runnable = chat.build(GenericFakeChatModel(messages=iter([message] * 2))).runnable

    runnable.invoke({"messages": talk(1)})

    assert message.response_metadata == {"finish_reason": "stop"}


def test_the_chain_is_built_while_its_model_is_loading_and_used_afterwards() -> None:
    engine = ScriptedEngine(context=CONTEXT, load_delay_s=0.3)
    model = ChatLLaMA3(llm=LLaMA3_LLM(engine=engine))
    chain = chat.build(model)
    assert model.profile is None
    engine.wait_until_ready()

    answer = chain.runnable.invoke({"messages": talk(51)})

    assert answer.response_metadata["messages_left_out"] > 0
    engine.close()


# Instructions


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([HumanMessage("Hi!")], ["Be brief.", "Hi!"]),
        ([SystemMessage("Speak French."), HumanMessage("Hi!")], ["Be brief.\n\nSpeak French.", "Hi!"]),
        ([SystemMessage(""), HumanMessage("Hi!")], ["Be brief.", "Hi!"]),
        ([SystemMessage([{"type": "text", "text": "Rhyme."}]), HumanMessage("Hi!")], ["Be brief.\n\nRhyme.", "Hi!"]),
        ([HumanMessage("Hi!"), SystemMessage("Stop."), HumanMessage("?")], ["Be brief.", "Hi!", "Stop.", "?"]),
    ],
)
def test_the_callers_instructions_come_first(
    engine: ScriptedEngine, chain: Chain, conversation: list[BaseMessage], expected: list[str]
) -> None:
    options = {"system_prompt": "Be brief."}

    answer = chain.runnable.invoke({"messages": conversation}, {"configurable": options})

    assert shown(engine) == expected
    assert texts(chain.messages({"messages": conversation}, options)) == expected
    assert isinstance(chain.messages({"messages": conversation}, options)[0], SystemMessage)
    assert answer.response_metadata["messages_left_out"] == 0


@pytest.mark.parametrize("nothing", [None, "", " \n"])
def test_no_instructions_are_none(engine: ScriptedEngine, chain: Chain, nothing: str | None) -> None:
    chain.runnable.invoke({"messages": talk(1)}, {"configurable": {"system_prompt": nothing}})
    assert shown(engine) == texts(talk(1))


def test_instructions_stay_when_turns_go(engine: ScriptedEngine, chain: Chain) -> None:
    chain.runnable.invoke({"messages": talk(51)}, {"configurable": {"system_prompt": "Be brief."}})
    first, second, *_ = shown(engine)
    assert first == "Be brief."
    assert second != talk(1)[0].text


def test_the_messages_of_a_caller_are_left_as_they_are(chain: Chain) -> None:
    messages = [SystemMessage("Speak French."), *talk(51)]
    before = messages.copy()
    chain.messages({"messages": messages}, {"system_prompt": "Be brief."})
    assert messages == before
    assert messages[0].text == "Speak French."


def options_of(chain: Chain) -> dict[str, TypeAdapter[Any]]:
    return {spec.id: TypeAdapter(spec.annotation) for spec in chain.runnable.config_specs}


@pytest.mark.parametrize(
    ("name", "value", "is_allowed"),
    [
        ("on_overflow", "trim", True),
        ("on_overflow", "error", True),
        ("on_overflow", "drop", False),
        ("on_overflow", "", False),
        ("system_prompt", "x" * 10_000, True),
        ("system_prompt", "x" * 10_001, False),
        ("system_prompt", None, True),
        ("system_prompt", ["x"], False),
    ],
)
def test_the_options_are_bounded(chain: Chain, name: str, value: Any, is_allowed: Literal[True, False]) -> None:
    try:
        options_of(chain)[name].validate_python(value, strict=True)
    except ValidationError:
        assert not is_allowed
    else:
        assert is_allowed


def test_the_options_are_the_chats_and_the_models_and_only_those_go_to_the_model(chain: Chain) -> None:
    assert {"on_overflow", "system_prompt", "max_tokens", "temperature"} <= options_of(chain).keys()
    assert chain.options({"on_overflow": "error", "system_prompt": "x", "max_tokens": 5}) == {"max_tokens": 5}
    (default,) = [spec.default for spec in chain.runnable.config_specs if spec.id == "on_overflow"]
    assert default == "trim"


def test_an_unknown_way_is_refused_without_a_door_too(chain: Chain) -> None:
    with pytest.raises(InputError, match="trim or error, got 'drop'"):
        chain.runnable.invoke({"messages": talk(1)}, {"configurable": {"on_overflow": "drop"}})


def test_thousands_of_small_messages_are_counted_in_parts() -> None:
    """In one call, as their texts are short, what the template writes around each took a second in one piece."""
    counted: list[str] = []

    def token_ids(text: str) -> list[int]:
        counted.append(text)
        return [0] * len(text)

    model = FakeListChatModel(responses=[""], custom_get_token_ids=token_ids)
    assert Measure(model).count_messages([HumanMessage("a")] * 9_999) >= 9_999
    assert max(map(len, counted)) < WINDOW
