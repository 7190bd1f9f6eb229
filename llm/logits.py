"""From logits to the next token, by one request's `Sampling`. Knows torch; knows no model and no queue."""

from collections.abc import Sequence

import torch
from torch import Tensor

from llm.generation import Token, TokenLogprob
from llm.sampling import Sampling

MIN_TEMPERATURE = 1e-5
"""Below it, as above it, the likeliest token has all the probability; but float32 would overflow."""


class Chooser:
    """Chooses a request's tokens one after the other: holds its generator and what it has seen so far."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], *, vocab_size: int, device: torch.device) -> None:
        self._sampling = sampling
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)
        self._is_seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._is_seen[torch.tensor(prompt, device=device)] = True

    def choose(self, logits: Tensor) -> Token:
        """Choose the token that follows. `logits` has the shape (vocabulary,)."""
        logits = logits.float()
        penalised = penalise(logits, self._is_seen, self._sampling.repetition_penalty)
        if self._sampling.is_greedy:
            token_id = int(penalised.argmax())
        else:
            probabilities, ids = candidates(penalised, self._sampling)
            token_id = int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])
        self._is_seen[token_id] = True
        return Token(token_id, self._logprob(logits, token_id))

    def _logprob(self, logits: Tensor, token_id: int) -> TokenLogprob | None:
        if self._sampling.logprobs is None:
            return None
        logprobs = logits.log_softmax(dim=-1)
        top = logprobs.topk(self._sampling.logprobs)
        alternatives = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return TokenLogprob(token_id, float(logprobs[token_id]), alternatives)


def penalise(logits: Tensor, is_seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were seen less likely, as transformers' `RepetitionPenaltyLogitsProcessor` does.

    Both tensors have the shape (vocabulary,).
    """
    if penalty == 1:
        return logits
    penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(is_seen, penalised, logits)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn: (probabilities, ids), likeliest first, both of the shape (candidates,).

    Temperature, then top_k, top_p and min_p, in the order and with the meaning of transformers' logits warpers.
    The probabilities need not add up to 1: what was cut off is missing.
    """
    logits = (logits - logits.max()) / max(sampling.temperature, MIN_TEMPERATURE)
    if sampling.top_k:
        logits, ids = logits.topk(sampling.top_k)
    else:
        logits, ids = logits.sort(descending=True)
    probabilities = logits.softmax(dim=-1)
    # A token stays while the likelier ones do not yet add up to top_p; so the likeliest always stays.
    keep = probabilities.cumsum(dim=-1) - probabilities < sampling.top_p
    keep &= probabilities >= sampling.min_p * probabilities[0]
    keep[0] = True
    return probabilities[keep], ids[keep]
