"""The model itself, run by transformers and torch: token ids in, sampled tokens out. Knows no queue and no text."""

from collections.abc import Generator

import torch
from transformers import DynamicCache, PreTrainedModel

from llm.checkpoint import Checkpoint, load_checkpoint
from llm.engine import Request
from llm.generation import Token
from llm.loading import load_weights
from llm.logits import Chooser
from llm.references import ModelFiles

PREFILL_CHUNK = 256
"""Prompt tokens read in one step: a cancelled request goes on for one such step at most."""


class TransformersModel:
    """A `TokenSource` over a checkpoint's own forward, with a key-value cache for one request at a time."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        self._model = model

    @classmethod
    def load(
        cls, files: ModelFiles, *, dtype: str = "auto", device: str = "auto", max_context: int | None = None
    ) -> "TransformersModel":
        """Load a checkpoint directory; the other arguments are those of `LocalEngine`. Raises `ModelError`."""
        checkpoint = load_checkpoint(files, max_context=max_context)
        return cls(checkpoint, load_weights(files, dtype=dtype, device=device))

    @torch.inference_mode()
    def steps(self, request: Request) -> Generator[Token | None]:
        """Read the prompt chunk by chunk, then yield token after token, for as long as it is asked."""
        device = self._model.device
        cache = DynamicCache(config=self._model.config)
        chooser = Chooser(request.sampling, request.prompt, vocab_size=self.checkpoint.vocab_size, device=device)
        *chunks, chunk = torch.split(torch.tensor([request.prompt], device=device), PREFILL_CHUNK, dim=1)
        for first in chunks:
            self._model.base_model(input_ids=first, past_key_values=cache, use_cache=True)
            yield None
        # As a tensor: the number 1 would slice, and CPUs multiply slices slowly: 84 ms instead of 37 for 43 tokens.
        last = torch.tensor([-1])
        while True:
            output = self._model(input_ids=chunk, past_key_values=cache, use_cache=True, logits_to_keep=last)
            token = chooser.choose(output.logits[0, -1].to(device))
            yield token
            chunk = torch.tensor([[token.id]], device=device)
