"""LangChain's own standard tests for chat models, on the scripted engine and on the embedded model.

Those for tools, structured output, images and other files do not run: `ChatLLaMA3` says by its `profile` that it has
none of these. Those for overriding the model per call do not either: a local model is loaded once, not chosen per call.
`test_serdes` does not, since a model that holds an engine in this process cannot be written down;
`test_init_from_env` does not, since nothing is read from the environment; `test_stream_time` does not, since it is for
recorded HTTP traffic.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_tests.integration_tests import ChatModelIntegrationTests
from langchain_tests.unit_tests import ChatModelUnitTests

from llm import ChatLLaMA3, LLaMA3_LLM, LocalEngine, ScriptedEngine
from llm.engine import Engine


class LLaMA3Properties:
    """What both suites are told of the model."""

    engine: Engine

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatLLaMA3

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"llm": LLaMA3_LLM(engine=self.engine)}

    @property
    def has_tool_calling(self) -> bool:
        return False

    @property
    def has_structured_output(self) -> bool:
        return False

    @property
    def supports_model_override(self) -> bool:
        return False


class TestUnit(LLaMA3Properties, ChatModelUnitTests):
    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def scripted(cls) -> Iterator[None]:
        engine = ScriptedEngine()
        engine.wait_until_ready(30)
        cls.engine = engine
        yield
        engine.close()


class TestIntegration(LLaMA3Properties, ChatModelIntegrationTests):
    @property
    def standard_chat_model_params(self) -> dict[str, Any]:
        """Short answers, the same each time: drawn at random, one once rambled on to the end of the context."""
        return {"temperature": 0, "max_tokens": 100}

    @pytest.fixture(scope="class", autouse=True)
    @classmethod
    def embedded_model(cls) -> Iterator[None]:
        engine = LocalEngine("embedded")
        engine.wait_until_ready(100)
        cls.engine = engine
        yield
        engine.close()
