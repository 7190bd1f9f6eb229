import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.prompts import PromptTemplate
from pydantic import ValidationError

from llm import ChatLLaMA3, LLaMA3_LLM, ScriptedEngine
from llm.caller import Caller, current_caller
from llm.errors import BadReference, ContextOverflow, DeadlineExceeded, InvalidMessage, InvalidOption


@pytest.fixture
def engine() -> Iterator[ScriptedEngine]:
    engine = ScriptedEngine(lambda message: f"You said: {message}")
    engine.wait_until_ready(30)
    yield engine
    engine.close()


@pytest.fixture
def llm(engine: ScriptedEngine) -> LLaMA3_LLM:
    return LLaMA3_LLM(engine=engine)


# As the tutorials use it.


def test_a_path_is_loaded_and_called(tiny_llama3: Path) -> None:
    llm = LLaMA3_LLM(str(tiny_llama3), max_tokens=4)

    assert isinstance(llm("你是谁"), str)
    llm.close()


def test_the_keyword_of_the_tutorials_works(tiny_llama3: Path) -> None:
    llm = LLaMA3_LLM(mode_name_or_path=str(tiny_llama3), temperature=0)

    assert llm._call("Hi", max_tokens=2) == llm.invoke("Hi", max_tokens=2)
    assert llm._llm_type == "llama3"
    llm.close()


def test_its_defaults_are_those_of_the_tutorials(llm: LLaMA3_LLM) -> None:
    assert (llm.max_tokens, llm.temperature, llm.top_p, llm.repetition_penalty) == (512, 0.5, 0.9, 1.1)


def test_it_stands_in_a_chain(llm: LLaMA3_LLM) -> None:
    chain = PromptTemplate.from_template("Tell me about {topic}.") | llm

    assert chain.invoke({"topic": "rain"}) == "You said: Tell me about rain."


def test_a_prompt_is_put_as_a_user_message_in_the_models_own_format(llm: LLaMA3_LLM, engine: ScriptedEngine) -> None:
    llm("Hi")

    assert engine.prompts == [
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ]


def test_history_is_passed_in_and_never_kept(llm: LLaMA3_LLM, engine: ScriptedEngine) -> None:
    """The tutorials' class had `history=[]` as default: what one user said was in the next user's prompt."""
    llm.invoke("And yours?", history=[("user", "My name is Ada."), AIMessage("Hello!")])
    llm.invoke("Hi")

    first, second = engine.prompts
    assert "Ada" in first
    assert "Hello!" in first
    assert "Ada" not in second


# Options.


def test_stop_is_honoured_as_argument_as_default_and_bound(engine: ScriptedEngine) -> None:
    llm = LLaMA3_LLM(engine=engine)

    assert llm.invoke("one two three", stop=["two"]) == "You said: one "
    assert LLaMA3_LLM(engine=engine, stop=["one"]).invoke("one two") == "You said: "
    assert llm.bind(stop=["said"]).invoke("one") == "You "


def test_max_tokens_is_honoured(llm: LLaMA3_LLM) -> None:
    assert llm.invoke("Hi", max_tokens=3) == "You"


def test_a_default_of_max_tokens_gives_way_to_a_small_context() -> None:
    engine = ScriptedEngine("a" * 1000, context=100)
    engine.wait_until_ready(30)

    result = LLaMA3_LLM(engine=engine).generate(["Hi"])

    usage = (result.llm_output or {})["token_usage"]
    assert usage["total_tokens"] == 100
    with pytest.raises(ContextOverflow):
        LLaMA3_LLM(engine=engine).invoke("Hi", max_tokens=100)
    engine.close()


@pytest.mark.parametrize(("option", "value"), [("temperature", 3), ("max_tokens", 0), ("stop", [""]), ("nonsense", 1)])
def test_bad_options_are_refused_by_name(llm: LLaMA3_LLM, option: str, value: Any) -> None:
    with pytest.raises(InvalidOption, match=option):
        llm.invoke("Hi", **{option: value})


def test_bad_defaults_are_refused_when_it_is_built(engine: ScriptedEngine) -> None:
    with pytest.raises(InvalidOption, match="temperature"):
        LLaMA3_LLM(engine=engine, temperature=7)
    with pytest.raises(TypeError, match="nonsense"):
        LLaMA3_LLM(engine=engine, nonsense=1)
    with pytest.raises(TypeError, match="once"):
        LLaMA3_LLM("embedded", mode_name_or_path="embedded")
    with pytest.raises(TypeError, match="already"):
        LLaMA3_LLM("embedded", engine=engine)


def test_a_bad_default_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(InvalidOption, match="temperature"):
        LLaMA3_LLM("/nowhere", temperature=5)


def test_what_was_loaded_for_a_field_of_the_wrong_type_is_closed_again(tiny_llama3: Path) -> None:
    def engines() -> int:
        return sum(thread.name == f"engine {tiny_llama3}" for thread in threading.enumerate())

    before = engines()
    with pytest.raises(ValidationError):
        LLaMA3_LLM(str(tiny_llama3), timeout="soon")
    assert engines() == before


def test_a_device_that_is_none_is_refused_by_name() -> None:
    with pytest.raises(InvalidOption, match="device must be auto, cpu, cuda or cuda:N"):
        LLaMA3_LLM("embedded", device="tpu")


@pytest.mark.parametrize("history", ["abc", 5, [{"nonsense": 1}]])
def test_history_that_is_no_list_of_messages_is_refused(llm: LLaMA3_LLM, history: Any) -> None:
    with pytest.raises(InvalidMessage, match="history"):
        llm.invoke("Hi", history=history)


def test_a_reference_that_is_none_says_what_to_write() -> None:
    with pytest.raises(BadReference, match="hf:meta-llama/Meta-Llama-3-8B-Instruct"):
        LLaMA3_LLM("meta-llama/Meta-Llama-3-8B-Instruct")


def test_a_timeout_ends_a_call() -> None:
    engine = ScriptedEngine("a" * 1000, token_delay_s=0.01)
    engine.wait_until_ready(30)

    with pytest.raises(DeadlineExceeded):
        LLaMA3_LLM(engine=engine, timeout=0.1).invoke("Hi")
    engine.close()


# LangChain's ways of calling.


async def test_all_ways_of_calling_give_the_same(llm: LLaMA3_LLM) -> None:
    said = "You said: Hi"

    assert llm("Hi") == said
    assert llm.invoke("Hi") == said
    assert await llm.ainvoke("Hi") == said
    assert llm.batch(["Hi", "Hi"]) == [said, said]
    assert await llm.abatch(["Hi", "Hi"]) == [said, said]
    assert "".join(llm.stream("Hi")) == said
    assert "".join([chunk async for chunk in llm.astream("Hi")]) == said
    assert llm._call("Hi") == said
    assert await llm._acall("Hi") == said
    assert llm.generate(["Hi"]).generations[0][0].text == said


def test_streaming_streams() -> None:
    engine = ScriptedEngine("a b c d e f", token_delay_s=0.01)
    engine.wait_until_ready(30)

    assert len(list(LLaMA3_LLM(engine=engine).stream("Hi"))) > 3
    engine.close()


def test_a_batch_is_submitted_at_once(engine: ScriptedEngine) -> None:
    """LangChain's own loop would submit one prompt after the other, and an engine that batches would have no batch."""
    engine = ScriptedEngine("a" * 50, token_delay_s=0.005)
    engine.wait_until_ready(30)
    running: list[int] = []
    watch = threading.Timer(0.1, lambda: running.append(engine.health().running))
    watch.start()

    LLaMA3_LLM(engine=engine).batch(["a", "b", "c", "d"])

    assert running == [4]
    engine.close()


def test_callbacks_see_tokens(llm: LLaMA3_LLM) -> None:
    class Tokens(BaseCallbackHandler):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_llm_new_token(self, token: str | list[str | dict[str, Any]], **kwargs: Any) -> None:
            self.seen.append(str(token))

    tokens = Tokens()
    list(llm.stream("Hi", config={"callbacks": [tokens]}))

    assert "".join(tokens.seen) == "You said: Hi"


async def test_a_cancelled_call_frees_the_engine() -> None:
    engine = ScriptedEngine("a" * 5000, token_delay_s=0.01)
    engine.wait_until_ready(30)
    llm = LLaMA3_LLM(engine=engine)

    async def read() -> None:
        async for _ in llm.astream("Hi"):
            pass

    for call in (llm.ainvoke("Hi"), llm.abatch(["a", "b"]), read()):
        task = asyncio.ensure_future(call)
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.1)

    health = engine.health()
    assert (health.running, health.waiting) == (0, 0)
    await asyncio.to_thread(engine.close)


def test_a_sync_stream_that_is_closed_frees_the_engine() -> None:
    engine = ScriptedEngine("a" * 5000, token_delay_s=0.01)
    engine.wait_until_ready(30)
    stream = LLaMA3_LLM(engine=engine).stream("Hi")
    next(stream)

    stream.close()  # type: ignore[attr-defined]

    assert whole_life_ends(engine)
    engine.close()


def whole_life_ends(engine: ScriptedEngine) -> bool:
    for _ in range(100):
        if engine.health().running == 0:
            return True
        threading.Event().wait(0.01)
    return False


def test_it_counts_tokens_with_its_own_tokenizer(llm: LLaMA3_LLM) -> None:
    assert llm.get_num_tokens("Grüße") == 7
    assert llm.get_num_tokens("<|eot_id|>") == 10


def test_requests_carry_their_caller() -> None:
    engine = ScriptedEngine("a" * 1000, token_delay_s=0.01)
    engine.wait_until_ready(30)
    llm = LLaMA3_LLM(engine=engine)
    caller = Caller(trace_id="request 1", owner="ada", deadline=0.0)
    token = current_caller.set(caller)
    try:
        request = llm.request("Hi", None, {})
        assert (request.caller, request.trace_id) == (caller.id, "request 1")
        assert (request.owner, request.deadline) == ("ada", 0.0)
        with pytest.raises(DeadlineExceeded):
            ChatLLaMA3(llm=llm).invoke([HumanMessage("Hi")])
    finally:
        current_caller.reset(token)
        engine.close()
