"""Runs the sequences of an engine on a Llama: their blocks of memory, their steps, their sampling. Knows no queue.

A prompt is read in chunks that end at fixed positions, each by itself, and a decode step computes every row alike
whatever shares it: what a request generates does not depend on who else is there. What is reused is what a chunk would
compute again; only answers are not: they come from decode steps, and reading them again as a part of a prompt (the next
turn of a chat, or a request that had to pause) rounds floats in another order.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llm.checkpoint import Checkpoint, load_checkpoint
from llm.engine import Request
from llm.errors import EngineDead, LLMError, ModelError, OutOfDeviceMemory
from llm.generation import Token
from llm.llama.blocks import BlockPool, BlockTable
from llm.llama.memory import plan_memory
from llm.llama.model import Llama
from llm.llama.sampler import Sampler, sample
from llm.llama.weights import ARCHITECTURES, take_weights
from llm.loading import load_weights
from llm.machine import limit_torch_threads
from llm.prompt import prepare_encoder
from llm.references import ModelFiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 256
"""Prompt tokens read in one step: others wait so long for their next token, and a cancelled request goes on so long."""
LOAD_ATTEMPTS = 3

log = logging.getLogger(__name__)


class LlamaSequence:
    """One request: its tokens, its blocks while it has room, and its sampling."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sampler = Sampler(request.sampling, request.prompt)
        self.tokens = list(request.prompt)
        self.table: BlockTable | None = None
        self.num_computed = 0
        """Prompt tokens that were computed before its first token came."""

    @property
    def num_to_read(self) -> int:
        """Up to the end of a chunk, or to the last token."""
        start = self.placed.num_filled
        return min(len(self.tokens) - 1, (start // PREFILL_CHUNK + 1) * PREFILL_CHUNK) - start

    @property
    def num_cached(self) -> int:
        """Prompt tokens that others had computed."""
        return max(0, len(self.request.prompt) - 1 - self.num_computed)

    @property
    def placed(self) -> BlockTable:
        """Its blocks; only between `admit` and `release`."""
        assert self.table is not None, "a sequence without room"
        return self.table


class LlamaRunner:
    """A `Runner` over a checkpoint of Llama's architecture, on a CPU or on GPUs."""

    def __init__(self, checkpoint: Checkpoint, model: Llama, *, slots: int) -> None:
        self.checkpoint = checkpoint
        self.slots = slots
        self._model = model
        self._pool = BlockPool(model.num_blocks)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        *,
        dtype: str = "auto",
        device: str = "auto",
        quantize: str = "auto",
        max_slots: int | None = None,
        max_context: int | None = None,
    ) -> "LlamaRunner":
        """Load a checkpoint directory; the other arguments are those of `LocalEngine`. Raises `ModelError`."""
        limit_torch_threads()
        checkpoint = load_checkpoint(files, max_context=max_context)
        prepare_encoder(checkpoint.tokenizer)
        loaded = _load_in_one_dtype(files, dtype=dtype, device=device)
        weights = take_weights(loaded, context=checkpoint.context, quantize=quantize)
        del loaded
        plan = plan_memory(weights, context=checkpoint.context, max_slots=max_slots, is_fixed=max_context is not None)
        return cls(replace(checkpoint, context=plan.context), Llama(weights, plan.num_blocks), slots=plan.slots)

    @property
    def prefill_budget(self) -> int:
        """One chunk of a long prompt, or as much of short ones."""
        return PREFILL_CHUNK

    @property
    def memory_use(self) -> float:
        """The part of all blocks that cannot be had."""
        return (self._pool.num_blocks - self._pool.num_free) / self._pool.num_blocks

    def open(self, request: Request) -> LlamaSequence:
        """Begin a request."""
        return LlamaSequence(request)

    def admit(self, sequence: LlamaSequence) -> bool:
        """Take blocks for all of its tokens, the longest prefix that is there already among them."""
        request = sequence.request
        sequence.table = self._pool.open(sequence.tokens, owner=request.owner, num_shared=request.num_shared)
        return sequence.table is not None

    def prefill(self, sequence: LlamaSequence) -> None:
        """Read a chunk of its tokens, or find that somebody has read them meanwhile."""
        table = sequence.placed
        end = table.num_filled + sequence.num_to_read
        self._pool.adopt(table)
        start = table.num_filled
        if start >= end:
            return
        with _typed_errors():
            self._model.prefill(sequence.tokens[start:end], start, table.blocks)
        self._pool.fill(table, end)
        if len(sequence.tokens) == len(sequence.request.prompt):
            sequence.num_computed += end - start

    def grow(self, sequence: LlamaSequence) -> bool:
        """Make sure of a block for its last token."""
        return self._pool.grow(sequence.placed)

    def decode(self, sequences: list[LlamaSequence]) -> list[Token | LLMError]:
        """Compute the next token of each."""
        with _typed_errors():
            logits = self._model.decode(
                [sequence.tokens[-1] for sequence in sequences],
                [len(sequence.tokens) - 1 for sequence in sequences],
                [sequence.placed.blocks for sequence in sequences],
            )
            tokens = sample(logits, [sequence.sampler for sequence in sequences])
        for sequence, token in zip(sequences, tokens, strict=True):
            if isinstance(token, Token):
                self._pool.fill(sequence.placed, len(sequence.tokens))
                self._pool.append(sequence.placed, token.id)
                sequence.tokens.append(token.id)
        return list(tokens)

    def release(self, sequence: LlamaSequence) -> None:
        """Give its blocks back. What they hold may be found again, by itself and by others."""
        if sequence.table is not None:
            self._pool.close(sequence.table)
            sequence.table = None

    def reset(self) -> None:
        """Forget all sequences, and what memory holds."""
        self._pool = BlockPool(self._model.num_blocks)

    def close(self) -> None:
        """Free weights and memory."""
        del self._model


def _load_in_one_dtype(files: ModelFiles, *, dtype: str, device: str) -> "PreTrainedModel":
    """Load the weights in the requested dtype, also while other models load.

    transformers creates parameters in torch's default dtype, which it sets for that time and which belongs to the whole
    process: another thread that sets it, or loads a model, changes the dtype of parameters, and with it the answers.
    """
    for _ in range(LOAD_ATTEMPTS):
        model = load_weights(files, dtype=dtype, device=device)
        known = model.config.model_type in ARCHITECTURES  # others may mix dtypes; they are refused later
        if not known or {parameter.dtype for parameter in model.parameters()} == {model.config.dtype}:
            return model
        log.warning("Another thread changed torch's default dtype while the model loaded: it is loaded again")
        del model
    raise ModelError(
        f"torch's default dtype was changed in each of {LOAD_ATTEMPTS} attempts to load {files.directory}: let nothing "
        "else set it, or load a model, at the same time"
    )


@contextlib.contextmanager
def _typed_errors() -> Iterator[None]:
    """Tell apart what torch raises: no memory for this step, or a device that answers no more."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise OutOfDeviceMemory(f"the device ran out of memory in a step: {error}") from error
    except torch.AcceleratorError as error:
        raise EngineDead(f"the device has failed: {error}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # how torch says it of a CPU
            raise
        raise OutOfDeviceMemory("the machine ran out of memory in a step") from error
