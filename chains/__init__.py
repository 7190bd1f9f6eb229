"""What is hosted: LangChain chains over whatever chat model they are handed. Knows LangChain; knows no HTTP, and no
model of its own.

One more chain is one file beside `translate.py` and one line below.
"""

from collections.abc import Callable

from langchain_core.language_models import BaseChatModel

from chains import brief, chat, summarize, translate
from chains.chain import Chain
from chains.documents.languages import warn_without_detector

CHAINS: tuple[Callable[[BaseChatModel], Chain], ...] = (
    chat.build,
    translate.build,
    translate.build_document,
    summarize.build,
    brief.build,
)
"""The registry, in the order in which people see it."""

__all__ = ["CHAINS", "Chain", "brief", "build_chains", "chat", "summarize", "translate"]


def build_chains(model: BaseChatModel) -> list[Chain]:
    """Build every chain of the registry over one model. Raises ValueError for two of one name."""
    warn_without_detector()
    chains = [build(model) for build in CHAINS]
    names = [chain.name for chain in chains]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two chains are called {', '.join(doubled)}")
    return chains
