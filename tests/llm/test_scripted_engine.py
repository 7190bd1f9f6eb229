from collections.abc import Iterator

import pytest
from langchain_core.messages import HumanMessage, SystemMessage

from llm.engine import Request
from llm.errors import GenerationFailed
from llm.generation import Chunk, FinishReason
from llm.prompt import encode
from llm.sampling import Sampling
from llm.scripted_engine import Script, ScriptedEngine


def answer(text: str, script: str | Script) -> Chunk:
    engine = ScriptedEngine(script)
    try:
        ids = encode(engine.wait_until_ready(30).tokenizer, [SystemMessage("Be brief."), HumanMessage(text)])
        return sum(engine.generate(Request(prompt=tuple(ids), sampling=Sampling())), Chunk())
    finally:
        engine.close()


def test_it_says_what_the_script_says() -> None:
    said = answer("Grüße 🙂", lambda message: f"You said: {message}")

    assert said.text == "You said: Grüße 🙂"
    assert said.finish_reason is FinishReason.STOP


def test_it_answers_the_same_to_everything_if_the_script_is_a_string() -> None:
    assert answer("Hi", "Yes.").text == "Yes."


def test_a_script_may_answer_piece_by_piece_and_fail_in_the_middle() -> None:
    def script(message: str) -> Iterator[str]:
        yield "one "
        raise RuntimeError("secret")

    with pytest.raises(GenerationFailed) as caught:
        answer("Hi", script)
    assert "secret" not in str(caught.value)


def test_it_remembers_the_prompts_that_it_saw() -> None:
    engine = ScriptedEngine()
    ids = encode(engine.wait_until_ready(30).tokenizer, [HumanMessage("Hi")])
    list(engine.generate(Request(prompt=tuple(ids), sampling=Sampling())))
    engine.close()

    (prompt,) = engine.prompts
    assert prompt.startswith("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>")
