"""The hosted chains through LangServe's own client, over the embedded model: every verb, sync and async."""

from collections.abc import Callable, Iterable
from typing import Annotated, Any

import httpx
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from typing_extensions import TypedDict

from chains import translate
from tests.server import Server

INPUTS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [HumanMessage("What is the capital of France?")]},
    "translate": {"text": "Good morning, my friends!", "target_language": "French"},
    "summarize": {"text": "The cat sat on the mat. It rained all day, so the cat did not want to go out."},
}
GREEDY: RunnableConfig = {"configurable": {"temperature": 0, "repetition_penalty": 1, "max_tokens": 10}}

each_chain = pytest.mark.parametrize("name", INPUTS)
stream_log_is_deprecated = pytest.mark.filterwarnings("ignore:astream_log is deprecated")


def text_of(output: Any) -> str:
    return output if isinstance(output, str) else str(output.content)


def is_whole_answer(name: str, output: Any) -> bool:
    """The type that the chain promises, and some text."""
    return type(output) is (AIMessage if name == "chat" else str) and bool(text_of(output).strip())


def joined(chunks: Iterable[Any]) -> str:
    return "".join(map(text_of, chunks))


@each_chain
def test_invoke_batch_and_stream_give_the_same_answer(server: Server, name: str) -> None:
    chain = server.chain(name)
    answer = chain.invoke(INPUTS[name], GREEDY)
    assert is_whole_answer(name, answer)
    (only,) = chain.batch([INPUTS[name]], GREEDY)
    assert is_whole_answer(name, only)
    assert text_of(only) == text_of(answer)
    chunks = list(chain.stream(INPUTS[name], GREEDY))
    assert len(chunks) > 1
    assert joined(chunks) == text_of(answer)


@each_chain
@stream_log_is_deprecated
async def test_awaited_verbs_give_the_same_answer(server: Server, name: str) -> None:
    chain = server.chain(name)
    answer = await chain.ainvoke(INPUTS[name], GREEDY)
    assert is_whole_answer(name, answer)
    (only,) = await chain.abatch([INPUTS[name]], GREEDY)
    assert is_whole_answer(name, only)
    assert text_of(only) == text_of(answer)
    assert joined([chunk async for chunk in chain.astream(INPUTS[name], GREEDY)]) == text_of(answer)

    log: Any = None
    async for patch in chain.astream_log(INPUTS[name], GREEDY):
        log = patch if log is None else log + patch
    assert joined(log.state["streamed_output"]) == text_of(answer)
    assert text_of(log.state["final_output"]) == text_of(answer)

    events = [event async for event in chain.astream_events(INPUTS[name], GREEDY, version="v2")]
    root = [event for event in events if event["name"] == f"/{name}"]
    assert root[0]["event"] == "on_chain_start"
    assert joined(event["data"]["chunk"] for event in root if event["event"] == "on_chain_stream") == text_of(answer)
    assert root[-1]["event"] == "on_chain_end"
    assert text_of(root[-1]["data"]["output"]) == text_of(answer)


def test_a_batch_answers_each_input_in_its_place_and_with_its_own_options(server: Server) -> None:
    chain = server.chain("chat")
    inputs = [INPUTS["chat"], {"messages": [HumanMessage("Count from one to twenty.")]}]
    configs: Any = [
        {"configurable": {"temperature": 0}},
        {"configurable": {"temperature": 0, "max_tokens": 4}},
    ]
    capital, counting = chain.batch(inputs, configs)
    assert "Paris" in capital.content
    assert "Paris" not in counting.content
    assert counting.usage_metadata["output_tokens"] == 4


def test_a_chat_answer_says_what_it_took_and_why_it_ended(server: Server) -> None:
    answer = server.chain("chat").invoke(INPUTS["chat"], {"configurable": {"temperature": 0, "max_tokens": 3}})
    assert answer.response_metadata == {
        "finish_reason": "length",
        "model_name": "embedded",
        "messages_left_out": 0,
    }
    assert answer.usage_metadata["output_tokens"] == 3
    assert answer.usage_metadata["input_tokens"] > 7
    assert answer.usage_metadata["total_tokens"] == answer.usage_metadata["input_tokens"] + 3
    whole = server.chain("chat").invoke(INPUTS["chat"], {"configurable": {"temperature": 0}})
    assert whole.response_metadata["finish_reason"] == "stop"


def test_a_second_turn_says_how_much_of_its_prompt_was_known(server: Server) -> None:
    chat = server.chain("chat")
    asked = HumanMessage("My name is Ada, and I like prime numbers. " * 20)
    first = chat.invoke({"messages": [asked]}, GREEDY)

    second = chat.invoke({"messages": [asked, first, HumanMessage("What is my name?")]}, GREEDY)

    known = second.usage_metadata["input_token_details"]["cache_read"]
    assert 0.9 * first.usage_metadata["input_tokens"] < known < second.usage_metadata["input_tokens"]


def test_streamed_chat_chunks_add_up_to_a_message_with_its_usage_once(server: Server) -> None:
    chunks = list(server.chain("chat").stream(INPUTS["chat"], GREEDY))
    assert {type(chunk) for chunk in chunks} == {AIMessageChunk}
    assert [chunk.usage_metadata is not None for chunk in chunks].count(True) == 1
    total = sum(chunks[1:], chunks[0])
    assert total.response_metadata["model_name"] == "embedded"
    assert total.response_metadata["finish_reason"] in ("stop", "length")
    assert total.usage_metadata["output_tokens"] <= 10


@each_chain
def test_the_first_chunk_arrives_before_the_last_is_made(server: Server, name: str) -> None:
    story = "The dog went down to the sea and met a lighthouse keeper who told it of a storm. " * 8
    inputs = {
        "chat": {"messages": [HumanMessage("Tell a long story about a dog.")]},
        "translate": {**INPUTS["translate"], "text": story},
        "summarize": {**INPUTS["summarize"], "text": story, "max_words": 500},
    }
    options: RunnableConfig = {"configurable": {"max_tokens": 300, "seed": 1, "temperature": 1}}
    chunks = server.chain(name).stream(inputs[name], options)
    first = next(chunks)
    assert server.health()["running"] == 1
    rest = list(chunks)
    assert len(rest) > 5
    assert joined([first, *rest]).strip()


def test_a_seed_repeats_an_answer(server: Server) -> None:
    chain = server.chain("chat")

    def ask(seed: int) -> str:
        configurable = {"temperature": 1.5, "top_p": 1, "max_tokens": 16, "seed": seed}
        return text_of(chain.invoke({"messages": [("human", "Tell a story.")]}, {"configurable": configurable}))

    assert ask(7) == ask(7)
    assert ask(7) != ask(8)


@each_chain
def test_an_answer_ends_before_a_stop_string(server: Server, name: str) -> None:
    chain = server.chain(name)
    answer = text_of(chain.invoke(INPUTS[name], GREEDY))
    stop = answer[len(answer) // 2 :][:3]
    stopping: RunnableConfig = {"configurable": {**GREEDY["configurable"], "stop": [stop]}}
    assert text_of(chain.invoke(INPUTS[name], stopping)) == answer[: answer.index(stop)]
    assert joined(chain.stream(INPUTS[name], stopping)) == answer[: answer.index(stop)]


def by_hand(language: str) -> Runnable[str, dict[str, Any]]:
    return RunnableLambda(lambda summary: {"text": summary, "target_language": language})


@pytest.mark.parametrize("adapter", [translate.to, by_hand])
async def test_remote_chains_compose(server: Server, adapter: Callable[[str], Runnable[str, dict[str, Any]]]) -> None:
    composed: Runnable[Any, Any] = server.chain("summarize") | adapter("German") | server.chain("translate")
    answer = composed.invoke(INPUTS["summarize"], GREEDY)
    assert isinstance(answer, str)
    assert answer.strip()
    assert await composed.ainvoke(INPUTS["summarize"], GREEDY) == answer
    chunks = list(composed.stream(INPUTS["summarize"], GREEDY))
    assert len(chunks) > 1
    assert "".join(chunks) == answer


class Conversation(TypedDict):
    messages: Annotated[list[AnyMessage], add_messages]


async def test_a_langgraph_node_can_call_a_remote_chain_and_remembers_by_thread(server: Server) -> None:
    """LangGraph hands the client its own keys (`thread_id`, `checkpoint_ns`, …), which go to the server unasked."""
    chat = server.chain("chat")

    async def answer(state: Conversation, config: RunnableConfig) -> dict[str, Any]:
        configurable = {**config["configurable"], "temperature": 0, "max_tokens": 12}
        message = await chat.ainvoke({"messages": state["messages"]}, {**config, "configurable": configurable})
        return {"messages": [message]}

    builder = StateGraph(Conversation)
    builder.add_node("answer", answer)
    builder.add_edge(START, "answer")
    builder.add_edge("answer", END)
    graph = builder.compile(checkpointer=InMemorySaver())
    thread: RunnableConfig = {"configurable": {"thread_id": "one"}}
    first = await graph.ainvoke({"messages": [HumanMessage("What is the capital of France?")]}, thread)
    assert "Paris" in first["messages"][-1].content
    second = await graph.ainvoke({"messages": [HumanMessage("And of Italy?")]}, thread)
    assert [message.type for message in second["messages"]] == ["human", "ai", "human", "ai"]
    asked = [turn["messages"][-1].usage_metadata["input_tokens"] for turn in (first, second)]
    assert asked[1] > asked[0] + 8


def test_a_remote_chain_can_be_a_langgraph_node_itself(server: Server) -> None:
    class Text(TypedDict, total=False):
        text: str
        target_language: str
        translation: str

    builder = StateGraph(Text)
    node: Runnable[Any, Any] = server.chain("translate") | RunnableLambda(lambda text: {"translation": text})
    builder.add_node("translate", node)
    builder.add_edge(START, "translate")
    builder.add_edge("translate", END)
    graph = builder.compile(checkpointer=InMemorySaver())
    thread: RunnableConfig = {"configurable": {"thread_id": "one", "max_tokens": 8}}
    state: Any = INPUTS["translate"]
    assert graph.invoke(state, thread)["translation"].strip()


FAILING = {"text": "please fail", "target_language": "German"}
FAILURE = "generation failed"


def test_an_error_in_an_answer_is_raised_by_the_client(scripted_server: Server) -> None:
    chain = scripted_server.chain("translate")
    with pytest.raises(httpx.HTTPStatusError, match=FAILURE) as caught:
        chain.invoke(FAILING)
    assert caught.value.response.status_code == 500
    with pytest.raises(httpx.HTTPStatusError, match=FAILURE):
        chain.batch([FAILING])


def test_an_error_inside_a_stream_is_raised_by_the_client_after_what_came(scripted_server: Server) -> None:
    chunks: list[str] = []
    with pytest.raises(httpx.HTTPStatusError, match=FAILURE) as caught:
        chunks.extend(scripted_server.chain("translate").stream(FAILING))  # extend keeps what came before the error
    assert "".join(chunks) == "it was going well"
    assert caught.value.response.status_code == 500
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("verb", ["astream", "astream_log", "astream_events"])
@stream_log_is_deprecated
async def test_an_error_inside_an_awaited_stream_is_raised_by_the_client(scripted_server: Server, verb: str) -> None:
    chain = scripted_server.chain("translate")
    streams: dict[str, Callable[[], Any]] = {
        "astream": lambda: chain.astream(FAILING),
        "astream_log": lambda: chain.astream_log(FAILING),
        "astream_events": lambda: chain.astream_events(FAILING, version="v2"),
    }
    stream = streams[verb]()
    assert await anext(stream)
    with pytest.raises(httpx.HTTPStatusError, match=FAILURE):
        _ = [chunk async for chunk in stream]


async def test_a_refusal_is_raised_by_the_client(scripted_server: Server) -> None:
    """LangServe's client shows the body of a refusal, and so the field, only where it does not stream."""
    chain = scripted_server.chain("translate")
    wrong = {"text": "", "target_language": "German"}
    with pytest.raises(httpx.HTTPStatusError, match=r"input\.text"):
        chain.invoke(wrong)
    with pytest.raises(httpx.HTTPStatusError, match=r"inputs\[1\]\.text"):
        await chain.abatch([INPUTS["translate"], wrong])
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        list(chain.stream(wrong))
    with pytest.raises(httpx.HTTPStatusError, match="422"):
        _ = [event async for event in chain.astream_events(wrong, version="v2")]
