"""An engine without weights: it answers what a script says, one byte per token. For tests and for writing chains."""

import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from llm.batching_engine import BatchingEngine
from llm.checkpoint import Checkpoint
from llm.engine import Request
from llm.errors import GenerationFailed, LLMError
from llm.generation import Token, TokenLogprob

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

Script = Callable[[str], str | Iterable[str]]
"""Given what the last message said, what to answer: at once, or piece by piece as they are asked for."""


MAX_PROMPTS = 1_000
"""How many prompts are remembered."""


def echo(message: str) -> str:
    """The default script: say what was said."""
    return message


class ScriptedEngine(BatchingEngine["Answer"]):
    """Answers by a script, through the same queue, slots, limits, stop strings and cancellation as a real engine.

    Its tokens are bytes, and its prompts are Llama 3's.
    """

    def __init__(
        self,
        script: str | Script = echo,
        *,
        name: str = "scripted",
        context: int = 8192,
        token_delay_s: float = 0.0,
        load_delay_s: float = 0.0,
        max_slots: int = 16,
    ) -> None:
        """Return at once.

        Args:
            script: The answer, or a function from the last message to the answer. If it raises, at once or between
                two pieces, the request fails. It is run in the engine's thread: while it sleeps, all others wait.
            name: The model's name.
            context: Tokens (bytes) of prompt and answer together.
            token_delay_s: Time that a step takes: one token for each request that runs.
            load_delay_s: Time that loading takes.
            max_slots: Requests that run at once.
        """
        self._prompts: deque[str] = deque(maxlen=MAX_PROMPTS)

        def open_runner() -> ScriptRunner:
            time.sleep(load_delay_s)
            said = script if callable(script) else lambda _: script
            return ScriptRunner(said, name, context, token_delay_s, max_slots, self._prompts)

        super().__init__(name, open_runner)

    @property
    def prompts(self) -> list[str]:
        """The text of the last prompts seen, special tokens included, oldest first."""
        return list(self._prompts)


class Answer:
    """A `Sequence` whose tokens a script says."""

    num_cached = 0

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: Iterator[int] | None = None

    @property
    def num_to_read(self) -> int:
        """1 until the script was asked."""
        return int(self.tokens is None)


class ScriptRunner:
    """A `Runner` that spells out scripted answers."""

    memory_use = 0.0  # it needs none

    def __init__(
        self, script: Script, name: str, context: int, token_delay_s: float, slots: int, prompts: deque[str]
    ) -> None:
        self.slots = slots
        self._script = script
        self._token_delay_s = token_delay_s
        self._prompts = prompts
        tokenizer = byte_tokenizer()
        self._backend = tokenizer.backend_tokenizer
        vocabulary = self._backend.get_vocab()
        self._end = vocabulary["<|eot_id|>"]
        self.checkpoint = Checkpoint(
            name=name,
            tokenizer=tokenizer,
            context=context,
            vocab_size=len(tokenizer),
            stop_ids=frozenset(vocabulary[special] for special in ("<|eot_id|>", "<|end_of_text|>")),
            defaults={},
        )

    def open(self, request: Request) -> Answer:
        return Answer(request)

    def admit(self, sequence: Answer) -> bool:
        return True

    @property
    def prefill_budget(self) -> int:
        return 1

    def prefill(self, sequence: Answer) -> None:
        prompt = self._backend.decode(sequence.request.prompt, skip_special_tokens=False)
        self._prompts.append(prompt)
        answer = self._script(_last_message(prompt))
        sequence.tokens = self._spell([answer] if isinstance(answer, str) else answer)

    def grow(self, sequence: Answer) -> bool:
        return True

    def decode(self, sequences: list[Answer]) -> list[Token | LLMError]:
        time.sleep(self._token_delay_s)
        return [self._next(sequence) for sequence in sequences]

    def release(self, sequence: Answer) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _spell(self, pieces: Iterable[str]) -> Iterator[int]:
        for piece in pieces:
            yield from self._backend.encode(piece).ids
        yield self._end

    def _next(self, sequence: Answer) -> Token | LLMError:
        assert sequence.tokens is not None
        try:
            token_id = next(sequence.tokens)
        except Exception as error:
            failure = GenerationFailed(f"generation failed: {type(error).__name__}")
            failure.__cause__ = error
            return failure
        wants_logprob = sequence.request.sampling.logprobs is not None
        return Token(token_id, TokenLogprob(token_id, 0.0) if wants_logprob else None)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """A tokenizer of 256 bytes and Llama 3's special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(special, normalized=False) for special in SPECIALS])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token=SPECIALS[0], eos_token="<|eot_id|>"
    )


def _last_message(prompt: str) -> str:
    """The content of the last message in a Llama 3 prompt."""
    contents = re.findall(r"<\|end_header_id\|>\n\n(.*?)<\|eot_id\|>", prompt, re.DOTALL)
    return contents[-1] if contents else prompt
