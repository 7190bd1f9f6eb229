"""The model: a local Llama 3 for LangChain, and the engine that runs it.

    from llm import LLaMA3_LLM, ChatLLaMA3, Sampling

Knows torch and transformers; knows no chain and no HTTP. Names are looked up when they are used, so that importing a
part (the error types, say) does not bring in torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm.chat_llama3 import ChatLLaMA3
    from llm.llama3_llm import LLaMA3_LLM
    from llm.local_engine import LocalEngine
    from llm.sampling import Sampling
    from llm.scripted_engine import ScriptedEngine

__all__ = ["ChatLLaMA3", "LLaMA3_LLM", "LocalEngine", "Sampling", "ScriptedEngine"]

_MODULES = {
    "ChatLLaMA3": "llm.chat_llama3",
    "LLaMA3_LLM": "llm.llama3_llm",
    "LocalEngine": "llm.local_engine",
    "Sampling": "llm.sampling",
    "ScriptedEngine": "llm.scripted_engine",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
