"""From stacked logits to one token a row, each by its own request's `Sampling`.

Knows torch, on any device, and numpy, to sort on the CPU; knows no model, no cache, no queue and no text.

What a row gets depends on that row alone, to the last bit, whatever shares the batch: every operation here takes
elements one by one, or goes through a row (or a block of it) in an order that does not change with the number of rows.
A `sum` over the whole vocabulary is not of that kind: torch splits it between threads if there is one row.

Nothing is sorted that need not be. The few likeliest tokens are found among the blocks of tokens with the highest
maxima; only where options may leave more to choose from, more are ranked. What comes out is what sorting everything
would give. Of equally likely tokens, the one with the lowest id ranks first.
"""

import math
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from llm.errors import GenerationFailed
from llm.generation import Token, TokenLogprob
from llm.sampling import MAX_LOGPROBS, Sampling

MIN_TEMPERATURE = 1e-5
"""Below it, as above it, the likeliest token has all the probability; but float32 would overflow."""
BLOCK = 32
"""Neighbouring tokens that are looked at as one."""
NUM_RANKED = (128, 4096, 2**31)
"""Tokens that are ranked at first; in rows where those do not settle what can be drawn; and where these do not."""
PORTION = 2**18
"""Logits that a CPU works on at a time: what that takes stays in its caches."""


class Sampler:
    """The sampling state of one request: its options, its random numbers, the tokens it has seen."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.sampling = sampling
        self.seen = array("q", set(prompt) if self.is_penalised else ())
        """Ids that the repetition penalty applies to; they may repeat."""
        self._random = random.Random(sampling.seed)

    @property
    def is_penalised(self) -> bool:
        """True if tokens it has seen become less, or more, likely."""
        return self.sampling.repetition_penalty != 1

    @property
    def is_limited(self) -> bool:
        """True if some options may exclude tokens."""
        return self.sampling.top_k > 0 or self.sampling.top_p < 1 or self.sampling.min_p > 0

    def draw(self) -> list[float]:
        """The numbers behind the next draw: temperature, top_k, top_p, min_p and a random one from 0 to below 1."""
        options = self.sampling
        return [
            max(options.temperature, MIN_TEMPERATURE),
            options.top_k or math.inf,
            options.top_p if options.top_p < 1 else math.inf,
            options.min_p,
            self._random.random(),
        ]

    def take(self, token_id: int) -> None:
        """Note which token it got."""
        if self.is_penalised:
            self.seen.append(token_id)


@torch.inference_mode()
def sample(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token | GenerationFailed]:
    """Choose the token that follows in each row, and note it in the row's sampler.

    Args:
        logits: Shape (rows, vocabulary), of any float type. Tokens at -inf are never chosen. A row that has NaN, +inf
            or nothing above -inf gets an error in place of a token; the others get theirs.
        samplers: One for each row.
    """
    chosen = _chosen(_Stack.of(_penalised(logits, samplers)), samplers)
    for row, token_id in chosen.items():
        samplers[row].take(token_id)
    logprobs = _logprobs(logits, samplers, chosen)
    return [
        Token(chosen[row], logprobs.get(row))
        if row in chosen
        else GenerationFailed("the model produced no valid numbers for the next token")
        for row in range(len(samplers))
    ]


def _chosen(stack: "_Stack", samplers: Sequence[Sampler]) -> dict[int, int]:
    """The token of each row that has valid numbers. Waits for the device once, if the first ranking is enough."""
    ids = stack.likeliest()
    are_settled = torch.ones_like(ids, dtype=torch.bool)
    draws = {row: sampler.draw() for row, sampler in enumerate(samplers) if not sampler.sampling.is_greedy}
    if free := [row for row in draws if not samplers[row].is_limited]:
        ids[free] = _draw_free(stack.select(free), stack.columns(draws[row] for row in free))
    if limited := [row for row in draws if samplers[row].is_limited]:
        columns = stack.columns(draws[row] for row in limited)
        ids[limited], are_settled[limited] = _draw_limited(stack.select(limited), columns, NUM_RANKED[0])
    found = torch.stack((ids, stack.best.isfinite().flatten(), are_settled), dim=1).tolist()
    for num_ranked in NUM_RANKED[1:]:
        unsettled = [row for row, (_, is_sound, is_settled) in enumerate(found) if is_sound and not is_settled]
        for rows in stack.portions(unsettled):
            columns = stack.columns(draws[row] for row in rows)
            again = torch.stack(_draw_limited(stack.select(rows), columns, num_ranked), dim=1).tolist()
            for row, (token_id, is_settled) in zip(rows, again, strict=True):
                found[row] = [token_id, True, is_settled]
    return {row: token_id for row, (token_id, is_sound, _) in enumerate(found) if is_sound}


@dataclass(frozen=True, slots=True)
class _Stack:
    """Rows of logits, penalties applied, with the maximum of each block and of each row."""

    scores: Tensor
    """(rows, blocks, BLOCK), float32."""
    tops: Tensor
    """(rows, blocks)."""
    best: Tensor
    """(rows, 1). Not finite if the row has no valid numbers."""

    @classmethod
    def of(cls, scores: Tensor) -> "_Stack":
        num_rows, vocab_size = scores.shape
        if vocab_size % BLOCK:
            scores = torch.nn.functional.pad(scores, (0, -vocab_size % BLOCK), value=-math.inf)
        scores = scores.view(num_rows, -(-vocab_size // BLOCK), BLOCK)
        tops = scores.amax(dim=-1)
        return cls(scores, tops, tops.amax(dim=-1, keepdim=True))

    def select(self, rows: Sequence[int]) -> "_Stack":
        """These rows, in ascending order."""
        if len(rows) == len(self.scores):
            return self
        index = torch.tensor(rows, dtype=torch.int64, device=self.scores.device)
        return _Stack(self.scores[index], self.tops[index], self.best[index])

    def portions(self, rows: Sequence[int]) -> Iterator[Sequence[int]]:
        """The rows, as many at a time as are best worked on at once."""
        size = max(1, PORTION // (self.tops.shape[1] * BLOCK) if self.scores.is_cpu else len(rows))
        return (rows[start : start + size] for start in range(0, len(rows), size))

    def columns(self, draws: Iterable[Sequence[float]]) -> tuple[Tensor, ...]:
        """The numbers of one draw a row as one column, (rows, 1), for each of the numbers."""
        return torch.tensor([*draws], dtype=torch.float64, device=self.scores.device)[..., None].unbind(dim=1)

    def block(self, index: Tensor) -> Tensor:
        """The scores of one block of each row: (rows, BLOCK). `index` is (rows, 1)."""
        return self.scores[torch.arange(len(index), device=index.device), index.flatten()]

    def likeliest(self) -> Tensor:
        """The likeliest token of each row: (rows,)."""
        index = self.tops.argmax(dim=-1, keepdim=True)
        return (index * BLOCK + self.block(index).argmax(dim=-1, keepdim=True)).flatten()

    def probabilities(self, temperature: Tensor) -> Iterator[Tensor]:
        """Portion by portion; each is (some rows, blocks, BLOCK)."""
        for rows in self.portions(range(len(self.scores))):
            part = slice(rows[0], rows[-1] + 1)
            scaled = _scaled(self.best[part] - self.scores[part].flatten(1), temperature[part])
            yield scaled.softmax(dim=-1).view(len(rows), -1, BLOCK)

    def highest(self, temperature: Tensor) -> Tensor:
        """The probability of the likeliest token of each row: (rows, 1)."""
        return torch.cat([portion.flatten(1).amax(dim=-1, keepdim=True) for portion in self.probabilities(temperature)])


def _scaled(distance: Tensor, temperature: Tensor) -> Tensor:
    """Log-probabilities but for a constant, by the scores' distance from the best, which is overwritten.

    It is not the scores that are divided: by a small temperature, they could overflow to where all are the same.
    """
    return distance.div_(-temperature.float())


def _penalised(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The logits in float32, those of tokens that were seen made less likely, as transformers does it."""
    rows = [row for row, sampler in enumerate(samplers) if sampler.seen]
    if not rows:
        return logits.float()
    seen = [torch.frombuffer(samplers[row].seen, dtype=torch.int64) for row in rows]
    counts = torch.tensor([len(ids) for ids in seen], dtype=torch.int64, device="cpu")
    factors = [samplers[row].sampling.repetition_penalty for row in rows]
    penalties = torch.tensor(factors, dtype=torch.float32, device="cpu")
    row_of_each = torch.tensor(rows, dtype=torch.int64, device="cpu").repeat_interleave(counts)
    place = torch.stack((row_of_each, torch.cat(seen))).to(logits.device).unbind()
    penalty = penalties.repeat_interleave(counts).to(logits.device)
    scores = logits.to(torch.float32, copy=True)
    before = scores[place]
    scores[place] = torch.where(before < 0, before * penalty, before / penalty)
    return scores


def _draw_free(stack: _Stack, draws: Sequence[Tensor]) -> Tensor:
    """Draw from the whole vocabulary: (rows,). First the block, then, by what is left of the number, the token."""
    temperature, _, _, _, number = draws
    masses = torch.cat([portion.sum(dim=-1) for portion in stack.probabilities(temperature)])
    index, left = _pick(masses.double(), number)
    block = stack.block(index)
    probabilities = _scaled(block.amax(dim=-1, keepdim=True) - block, temperature).softmax(dim=-1)
    place, _ = _pick(probabilities.double(), left)
    return (index * BLOCK + place).flatten()


def _draw_limited(stack: _Stack, draws: Sequence[Tensor], num_ranked: int) -> tuple[Tensor, Tensor]:
    """Draw from what top_k, top_p and min_p leave, in this order and with the meaning of transformers' warpers.

    Looks at the likeliest `num_ranked` tokens. Returns ids and whether they are settled, both (rows,): a row is not
    settled if looking at more tokens could change what is left.
    """
    temperature, top_k, top_p, min_p, number = draws
    ids, distance, num_certain = _ranked(stack, num_ranked)
    weights = _scaled(distance, temperature).exp_().double()
    cumulative = weights.cumsum(dim=-1)
    num_top = top_k.clamp(max=ids.shape[1]).long()
    # In proportion to the best, of weight 1, all tokens together weigh one over its probability.
    total = torch.where(top_k.isfinite(), cumulative.gather(1, num_top - 1), 1 / stack.highest(temperature).double())
    # A token stays while the likelier ones do not yet add up to top_p; so the likeliest always stays.
    num_likely = torch.searchsorted(cumulative, top_p * total) + 1
    num_close = ((weights >= min_p) & (weights > 0)).sum(dim=-1, keepdim=True)
    num_left = num_top.minimum(num_likely).minimum(num_close).clamp(min=1)
    place = torch.searchsorted(cumulative, number * cumulative.gather(1, num_left - 1), right=True)
    is_settled = torch.where(top_k.isfinite(), num_top, num_left) <= num_certain
    return ids.gather(1, place.minimum(num_left - 1)).flatten(), is_settled.flatten()


def _ranked(stack: _Stack, num_ranked: int) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest tokens, best first: ids and how far their scores are below the best, both (rows, tokens).

    And how many of them, (rows, 1), are certain: tokens that are as likely as the last one may be missing here.
    """
    num_blocks = stack.tops.shape[1]
    if num_ranked < num_blocks:  # as many blocks hold as many of the likeliest
        index = stack.tops.topk(num_ranked, sorted=False).indices
        ids = (index[..., None] * BLOCK + torch.arange(BLOCK, device=index.device)).flatten(1)
        scores = stack.scores.flatten(1).gather(1, ids)
    else:
        scores = stack.scores.flatten(1)
        ids = torch.arange(scores.shape[1], device=scores.device)
    # Floats that are not negative have the order of their bits, so that distance and id make one number to sort by.
    keys = _least((stack.best - scores).view(torch.int32).long() << 32 | ids, num_ranked)
    distance = (keys >> 32).int().view(torch.float32)
    if num_ranked < num_blocks * BLOCK:
        num_certain = torch.searchsorted(distance, distance[:, -1:].contiguous())
    else:
        num_certain = torch.full_like(stack.best, distance.shape[1])
    return keys & 0xFFFFFFFF, distance, num_certain


def _least(keys: Tensor, count: int) -> Tensor:
    """The least of each row, in ascending order."""
    if not keys.is_cpu:
        return keys.topk(min(count, keys.shape[1]), largest=False).values
    table = keys.numpy()  # sorted in 0.15 ms a row, by vector instructions, where torch takes 8
    if count < table.shape[1]:
        table = numpy.partition(table, count, axis=-1)[:, :count]
    return torch.from_numpy(numpy.sort(table, axis=-1))


def _pick(weights: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution: where in each row `number` of the total weight is exceeded, and the rest.

    Weights are (rows, places), float64; all else is (rows, 1). The rest is the number's way through the weight picked,
    from 0 to 1. A place without weight is never picked, however the sums are rounded.
    """
    cumulative = weights.cumsum(dim=-1)
    target = number * cumulative[:, -1:]
    can_be = weights > 0
    is_beyond = can_be & (cumulative > target)
    place = (is_beyond.byte() + can_be.byte()).argmax(dim=-1, keepdim=True)
    weight = weights.gather(1, place)
    rest = (target - cumulative.gather(1, place) + weight) / weight
    return place, rest.clamp(0, 1)


def _logprobs(logits: Tensor, samplers: Sequence[Sampler], chosen: dict[int, int]) -> dict[int, TokenLogprob]:
    """By row, for those that ask: what the model itself made of the token that was chosen, and of the likeliest."""
    rows = [row for row in chosen if samplers[row].sampling.logprobs is not None]
    if not rows:
        return {}
    limits = {row: min(samplers[row].sampling.logprobs or 0, logits.shape[1]) for row in rows}
    stack = _Stack.of(logits[rows].float())
    best = stack.highest(torch.ones_like(stack.best)).log()
    ids = torch.tensor([[chosen[row]] for row in rows], dtype=torch.int64, device=logits.device)
    logprobs = best - (stack.best - stack.scores.flatten(1).gather(1, ids))
    top_ids, distance, _ = _ranked(stack, MAX_LOGPROBS)
    found = zip(rows, logprobs.tolist(), top_ids.tolist(), (best - distance).tolist(), strict=True)
    return {
        row: TokenLogprob(chosen[row], logprob, tuple(zip(top, values, strict=True))[: limits[row]])
        for row, (logprob,), top, values in found
    }
