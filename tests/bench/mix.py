"""What is asked of every engine: half chats, a quarter translations, a quarter summaries; 64 new tokens each, greedy.

The seed and a run's number fix the sequence. No two asks of one run begin with the same words, nor those of two runs:
what the chains write before a text is all that can be found in a cache, here as in real use.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from langchain_core.language_models import FakeListChatModel
from langchain_core.messages import BaseMessage, SystemMessage

from chains import build_chains
from chains.chain import fields_of
from tests.bench.prose import prose, question

MAX_TOKENS = 64
OPTIONS = {"temperature": 0, "repetition_penalty": 1, "max_tokens": MAX_TOKENS}
"""As our service calls them."""

ASKS_PER_RUN = 2_000
"""Room between the serial numbers of two runs."""

_TRANSLATE_WORDS, _SUMMARIZE_WORDS = 160, 690
"""With what the chains and the templates add: prompts of about 250 and 900 tokens."""

_LANGUAGES = ("French", "German", "Italian", "Portuguese", "Spanish")

Kind = Literal["chat", "translate", "summarize"]
_BLOCK: tuple[Kind, ...] = ("chat", "chat", "translate", "summarize")

_CHAINS = {
    chain.name: chain
    for chain in build_chains(FakeListChatModel(responses=[], custom_get_token_ids=lambda text: [0] * (len(text) // 5)))
}


def messages_for(kind: str, value: dict[str, Any]) -> list[BaseMessage]:
    """What our chain of that name shows its model first: for texts as short as these, all that it shows it."""
    chain = _CHAINS[kind]
    return chain.messages(fields_of(chain.input_type.model_validate(value)), {})


@dataclass(frozen=True, slots=True)
class Ask:
    """One request of the mix, for any engine."""

    kind: Kind
    input: dict[str, Any]
    """As our chain of that name takes it."""

    @property
    def messages(self) -> list[BaseMessage]:
        """What our chain shows its model for it."""
        return messages_for(self.kind, self.input)

    @property
    def openai_messages(self) -> list[dict[str, str]]:
        """The same, as OpenAI's clients write it."""
        return [
            {"role": "system" if isinstance(message, SystemMessage) else "user", "content": str(message.content)}
            for message in self.messages
        ]


def mix(count: int, *, run: int, seed: int = 0) -> Sequence[Ask]:
    """The first asks of a run. Of every four in a row, from the first on, two are chats."""
    if count > ASKS_PER_RUN:
        raise ValueError(f"at most {ASKS_PER_RUN} asks per run, got {count}")
    random = Random(f"{seed} {run}")
    kinds: list[Kind] = []
    while len(kinds) < count:
        kinds += random.sample(_BLOCK, len(_BLOCK))
    first = (seed * 1_000 + run) * ASKS_PER_RUN
    return [_ask(kind, first + index) for index, kind in enumerate(kinds[:count])]


def _ask(kind: Kind, serial: int) -> Ask:
    match kind:
        case "chat":
            return Ask(kind, {"messages": [{"role": "user", "content": question(serial)}]})
        case "translate":
            language = _LANGUAGES[serial % len(_LANGUAGES)]
            return Ask(kind, {"text": prose(serial, _TRANSLATE_WORDS), "target_language": language})
        case "summarize":
            return Ask(kind, {"text": prose(serial, _SUMMARIZE_WORDS), "style": "paragraph"})
