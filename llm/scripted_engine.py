"""An engine without weights: it answers what a script says, one byte per token. For tests and for writing chains."""

import re
import time
from collections.abc import Callable, Generator, Iterable
from typing import TYPE_CHECKING

from llm.checkpoint import Checkpoint
from llm.engine import Request
from llm.generation import Token, TokenLogprob
from llm.serial_engine import SerialEngine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

Script = Callable[[str], str | Iterable[str]]
"""Given what the last message said, what to answer: at once, or piece by piece as they are asked for."""


def echo(message: str) -> str:
    """The default script: say what was said."""
    return message


class ScriptedEngine(SerialEngine):
    """Answers by a script, through the same queue, limits, stop strings and cancellation as a real engine.

    Its tokens are bytes, and its prompts are Llama 3's. `prompts` holds the text of all prompts seen, special tokens
    included, oldest first.
    """

    def __init__(
        self,
        script: str | Script = echo,
        *,
        name: str = "scripted",
        context: int = 8192,
        token_delay_s: float = 0.0,
        load_delay_s: float = 0.0,
        max_queue: int | None = None,
    ) -> None:
        """Return at once.

        Args:
            script: The answer, or a function from the last message to the answer. If it raises, at once or between
                two pieces, the request fails.
            name: The model's name.
            context: Tokens (bytes) of prompt and answer together.
            token_delay_s: Time that each token takes.
            load_delay_s: Time that loading takes.
            max_queue: Requests that may wait; None: any number.
        """
        self.prompts: list[str] = []

        def open_script() -> _Script:
            time.sleep(load_delay_s)
            return _Script(script, name, context, token_delay_s, self.prompts)

        super().__init__(name, open_script, max_queue=max_queue)


class _Script:
    """A `TokenSource` that spells out scripted answers."""

    def __init__(self, script: str | Script, name: str, context: int, token_delay_s: float, prompts: list[str]) -> None:
        self._script = script if callable(script) else lambda _: script
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

    def steps(self, request: Request) -> Generator[Token | None]:
        prompt = self._backend.decode(request.prompt, skip_special_tokens=False)
        self._prompts.append(prompt)
        answer = self._script(_last_message(prompt))
        for piece in [answer] if isinstance(answer, str) else answer:
            yield from self._tokens(self._backend.encode(piece).ids, request)
        yield from self._tokens([self._end], request)

    def _tokens(self, ids: Iterable[int], request: Request) -> Generator[Token]:
        for token_id in ids:
            time.sleep(self._token_delay_s)
            wants_logprob = request.sampling.logprobs is not None
            yield Token(token_id, TokenLogprob(token_id, 0.0) if wants_logprob else None)


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
