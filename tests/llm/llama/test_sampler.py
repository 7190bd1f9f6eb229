"""The sampler, on logits made up here. How often a token comes is counted over evenly spaced random numbers."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.errors import GenerationFailed
from llm.generation import Token
from llm.llama import sampler as module
from llm.llama.sampler import Sampler, sample
from llm.sampling import Sampling

VOCABULARY = 500
FEW = (8, 32, 2**31)
"""Instead of `NUM_RANKED`: with a vocabulary of 500 tokens, all three are in use."""
JUST_BELOW_1 = 1 - 2**-53
VARIETY = [
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.3, logprobs=2),
    Sampling(temperature=0.7, seed=1, logprobs=20),
    Sampling(temperature=2, seed=2, repetition_penalty=0.7),
    Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.1, seed=3),
    Sampling(temperature=1, top_p=0.95, seed=4, logprobs=0),
    Sampling(temperature=2, top_p=0.99, seed=5),
    Sampling(top_k=40, seed=6, logprobs=5),
    Sampling(top_k=1000, seed=7),
    Sampling(min_p=0.05, temperature=1.5, seed=8),
    Sampling(temperature=1.2, top_k=60, top_p=0.8, min_p=0.01, repetition_penalty=1.2, seed=9, logprobs=3),
]


class Fixed(Sampler):
    """Draws with a number that is given."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], number: float) -> None:
        super().__init__(sampling, prompt)
        self._number = number

    def draw(self) -> list[float]:
        return [*super().draw()[:-1], self._number]


def some_logits(seed: int, *shape: int, scale: float = 4.0) -> Tensor:
    return torch.randn(shape or (VOCABULARY,), generator=torch.Generator().manual_seed(seed)) * scale


def tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[Token]:
    """What comes of it if no row fails."""
    found = sample(logits, samplers)
    return [token for token in found if isinstance(token, Token)] if len(found) == len(samplers) else []


def only(logits: Tensor, sampler: Sampler) -> Token:
    """The token of a single row."""
    (token,) = tokens(logits[None], [sampler])
    return token


def counts(logits: Tensor, sampling: Sampling, prompt: Sequence[int] = (), num: int = 250) -> Tensor:
    """How often each token comes for `num` evenly spaced numbers."""
    samplers = [Fixed(sampling, prompt, (index + 0.5) / num) for index in range(num)]
    ids = [token.id for token in tokens(logits.expand(num, -1), samplers)]
    return torch.bincount(torch.tensor(ids), minlength=len(logits))


def by_transformers(logits: Tensor, sampling: Sampling, prompt: Sequence[int] = (), nudge: float = 0) -> Tensor:
    """The probabilities in transformers. `nudge` moves top_p and min_p by that part."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(min(1.0, sampling.top_p * (1 + nudge))))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(min(1.0, sampling.min_p * (1 + nudge))))
    ids = torch.tensor([prompt], dtype=torch.long)
    scores: Tensor = processors(ids, logits[None].clone())  # type: ignore[arg-type]
    return scores[0].softmax(-1)


@pytest.fixture(params=[module.NUM_RANKED, FEW], ids=["many", "few"])
def _ranked_first(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "NUM_RANKED", request.param)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0.05, 2),
    top_k=st.just(0) | st.integers(1, 600),
    top_p=st.just(1.0) | st.floats(0.01, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
)


@pytest.mark.usefixtures("_ranked_first")
@settings(max_examples=40, deadline=None)
@given(sampling=samplings, seed=st.integers(0, 1000), scale=st.sampled_from([0.5, 2.0, 4.0]))
def test_each_token_comes_as_often_as_by_transformers(sampling: Sampling, seed: int, scale: float) -> None:
    logits, prompt = some_logits(seed, scale=scale), [3, 7, 7, 499]
    expected = by_transformers(logits, sampling, prompt)
    for nudge in (-1e-5, 1e-5):  # where rounding decides if a token stays, it may decide otherwise
        assume(torch.equal(by_transformers(logits, sampling, prompt, nudge) > 0, expected > 0))

    found = counts(logits, sampling, prompt)

    assert not found[expected == 0].any()
    # A stretch of the numbers, not a scattering, leads to a token: so its count is its share, rounded up or down.
    torch.testing.assert_close(found.float(), expected * 250, atol=1.01, rtol=1e-3)


@pytest.mark.parametrize("sampling", [s for s in VARIETY if not s.is_greedy], ids=str)
def test_tokens_come_as_often_as_they_should_by_the_own_generator(sampling: Sampling) -> None:
    logits = some_logits(1, scale=1.5)
    # Many requests, each with a seed of its own, rather than one request: so nothing is penalised on the way.
    samplers = [Sampler(replace(sampling, seed=seed, logprobs=None), [3]) for seed in range(2000)]

    ids = torch.tensor([token.id for token in tokens(logits.expand(2000, -1), samplers)])

    expected = by_transformers(logits, sampling, [3])
    found = torch.bincount(ids, minlength=VOCABULARY)
    assert not found[expected == 0].any()
    is_rare = expected * 2000 < 5  # too rare to be tested one by one
    pooled = [torch.cat((count[~is_rare], count[is_rare].sum()[None])) for count in (found, expected * 2000)]
    chi_square = ((pooled[0] - pooled[1]) ** 2 / pooled[1].clamp(min=1)).sum()
    freedom = len(pooled[0]) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sampling", [s for s in VARIETY if not s.is_greedy], ids=str)
@pytest.mark.parametrize("step", [1.0, 0.25, 0.001], ids="logits {} apart".format)
def test_ranking_a_few_tokens_first_draws_what_ranking_all_does(
    sampling: Sampling, step: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With logits in steps there are ties, as there are in bfloat16."""
    logits = (some_logits(2, scale=2) / step).round() * step
    found = []
    for num_ranked in (FEW, (2**31,), (8, 2**31)):
        monkeypatch.setattr(module, "NUM_RANKED", num_ranked)
        found.append(counts(logits, sampling).tolist())

    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("vocabulary", [4, 500, 4099, 49_152, 50_000])
def test_a_row_does_not_depend_on_the_others_nor_on_its_place(vocabulary: int) -> None:
    """To the last bit of the log-probabilities, over several steps, in which others come and go."""
    num_steps = 3 if vocabulary > 5000 else 6
    logits = some_logits(3, num_steps, len(VARIETY), vocabulary, scale=3)

    def fresh() -> list[Sampler]:
        return [Sampler(sampling, [row % 4, 1, 2]) for row, sampling in enumerate(VARIETY)]

    alone = [[only(logits[step, row], sampler) for step in range(num_steps)] for row, sampler in enumerate(fresh())]
    for shuffle in range(3):
        order = torch.randperm(len(VARIETY), generator=torch.Generator().manual_seed(shuffle)).tolist()
        samplers = fresh()
        together: list[list[Token]] = [[] for _ in VARIETY]
        for step in range(num_steps):
            present = order[: len(order) - step]
            found = tokens(logits[step, present], [samplers[row] for row in present])
            for row, token in zip(present, found, strict=True):
                together[row].append(token)

        for row, found in enumerate(together):
            assert found == alone[row][: len(found)], VARIETY[row]


def test_a_seed_repeats_another_differs_and_so_does_none() -> None:
    def answer(sampling: Sampling) -> list[int]:
        sampler = Sampler(sampling, [1])
        return [only(some_logits(step), sampler).id for step in range(20)]

    for top_p in (1.0, 0.95):
        assert answer(Sampling(seed=5, top_p=top_p)) == answer(Sampling(seed=5, top_p=top_p))
        assert answer(Sampling(seed=5, top_p=top_p)) != answer(Sampling(seed=6, top_p=top_p))
        assert answer(Sampling(temperature=2, top_p=top_p)) != answer(Sampling(temperature=2, top_p=top_p))


@pytest.mark.usefixtures("_ranked_first")
@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=1e-7)], ids=str)
def test_the_likeliest_token_is_taken_and_of_equal_ones_the_first(sampling: Sampling) -> None:
    logits = some_logits(4)
    assert only(logits, Sampler(sampling, [])).id == int(logits.argmax())

    if sampling.temperature != 1e-7:  # which of equal ones comes is then drawn
        logits[[490, 77, 78, 300]] = 99
        assert only(logits, Sampler(sampling, [])).id == 77


@pytest.mark.parametrize("penalty", [0.01, 0.5, 1.1, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, prompts = some_logits(5, 8, VOCABULARY), [[3, 7, 7, 499], [0], [], [*range(0, 500, 3)]] * 2
    samplers = [Sampler(Sampling(temperature=0, repetition_penalty=penalty), prompt) for prompt in prompts]
    generated: list[list[int]] = [[] for _ in prompts]
    for _ in range(5):
        seen = [
            torch.tensor([prompt + more], dtype=torch.long) for prompt, more in zip(prompts, generated, strict=True)
        ]
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        expected = [processor(ids, row[None].clone()) for ids, row in zip(seen, logits, strict=True)]

        found = [token.id for token in tokens(logits, samplers)]

        assert found == [int(scores.argmax()) for scores in expected]
        for more, token_id in zip(generated, found, strict=True):
            more.append(token_id)


def test_what_was_generated_counts_as_seen_and_what_others_generated_does_not() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0]] * 2)
    samplers = [Sampler(Sampling(temperature=0, repetition_penalty=penalty), [0]) for penalty in (2, 1.1)]

    assert [[token.id for token in tokens(logits, samplers)] for _ in range(2)] == [[1, 1], [2, 1]]


@pytest.mark.usefixtures("_ranked_first")
@pytest.mark.parametrize("number", [0.0, 1e-300, 0.5, JUST_BELOW_1])
@pytest.mark.parametrize("sampling", [s for s in VARIETY if not s.is_greedy], ids=str)
def test_no_token_without_probability_is_drawn(sampling: Sampling, number: float) -> None:
    """Whatever the random number; a vocabulary may be masked, up to a single token."""
    allowed = {"one": [77], "first and last": [0, 499], "far": [100, 400], "even": [*range(0, 500, 2)]}
    rows = torch.full((len(allowed), VOCABULARY), -math.inf)
    for row, ids in zip(rows, allowed.values(), strict=True):
        row[ids] = some_logits(6)[ids]
    rows[2, 400] = rows[2, 100] - 1000

    found = [token.id for token in tokens(rows, [Fixed(sampling, [1], number) for _ in allowed])]

    assert [token_id in ids for token_id, ids in zip(found, allowed.values(), strict=True)] == [True] * 4
    assert found[2] == 100


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=2), Sampling(top_p=0.99)], ids=str)
def test_each_token_has_the_numbers_from_its_share_s_start_to_below_its_end(sampling: Sampling) -> None:
    logits = torch.tensor([0.0, 0.0])
    numbers = [0.0, 0.25, 0.499999, 0.5, JUST_BELOW_1]

    found = tokens(logits.expand(5, -1), [Fixed(sampling, [], number) for number in numbers])

    assert [token.id for token in found] == [0, 0, 0, 1, 1]


def test_sums_rounded_the_wrong_way_lead_to_no_token_without_weight() -> None:
    """A GPU adds in another order in each place, so that a number may come out as 1, or beyond all that there is."""
    weights = torch.tensor([[0.0, 0.0, 3.0, 0.0]], dtype=torch.float64)

    for number in (0.0, 0.5, 1.0, 1.1):
        place, _ = module._pick(weights, torch.tensor([[number]], dtype=torch.float64))
        assert int(place) == 2


@pytest.mark.parametrize("number", [0.0, 0.3, JUST_BELOW_1])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 2.0])
@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-7, 1e-5, 0.01, 2.0])
def test_options_at_the_edge_of_what_floats_hold_still_choose(
    temperature: float, penalty: float, number: float
) -> None:
    """Divided by almost nothing, logits overflowed, and the request failed with an internal error."""
    logits = some_logits(0) * 1e4
    top = int(logits.argmax())
    limits: list[dict[str, float]] = [{}, {"top_p": 1e-9}, {"top_p": 0.999999}, {"top_k": 2}, {"min_p": 1.0}]
    samplers = [
        Fixed(Sampling.of({"temperature": temperature, "repetition_penalty": penalty, **limit}), [top], number)
        for limit in limits
    ]

    found = {token.id for token in tokens(logits.expand(len(limits), -1), samplers)}

    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([[top]]), logits[None].clone())
    assert found == {int(expected.argmax())}


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.nan, None])
def test_a_row_without_valid_numbers_fails_alone(wrong: float | None) -> None:
    logits = some_logits(7, len(VARIETY), VOCABULARY)
    expected = tokens(logits, [Sampler(sampling, [1]) for sampling in VARIETY])
    for row, sampling in enumerate(VARIETY):
        spoilt = logits.clone()
        spoilt[row, 17 if wrong is not None else slice(None)] = -math.inf if wrong is None else wrong
        samplers = [Sampler(sampling, [1]) for sampling in VARIETY]

        found = sample(spoilt, samplers)

        assert isinstance(found[row], GenerationFailed), sampling
        assert "no valid numbers" in str(found[row])
        assert found[:row] + found[row + 1 :] == expected[:row] + expected[row + 1 :]


def test_logprobs_are_those_of_the_model_before_any_option() -> None:
    logits = some_logits(8, 3, VOCABULARY)
    samplers = [
        Sampler(Sampling(temperature=0.1, top_k=2, repetition_penalty=1.5, logprobs=num), [int(logits[0].argmax())])
        for num in (0, 3, 20)
    ]

    found = tokens(logits, samplers)

    for token, num, expected in zip(found, (0, 3, 20), logits.log_softmax(-1), strict=True):
        assert token.logprob is not None
        assert token.logprob.token_id == token.id
        assert token.logprob.logprob == pytest.approx(float(expected[token.id]), abs=1e-5)
        top = expected.topk(num)
        assert [token_id for token_id, _ in token.logprob.top] == top.indices.tolist()
        assert [logprob for _, logprob in token.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_only_who_asks_gets_logprobs() -> None:
    samplers = [Sampler(Sampling(logprobs=logprobs), []) for logprobs in (None, 1, None)]

    found = tokens(some_logits(9, 3, VOCABULARY), samplers)

    assert [token.logprob is not None for token in found] == [False, True, False]


def test_a_vocabulary_may_be_smaller_than_what_is_asked_for() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    assert (counts(logits, Sampling(top_k=9)) - 250 * logits.softmax(-1)).abs().max() <= 1
    token = only(logits, Sampler(Sampling(temperature=0, logprobs=20), []))
    assert token.logprob is not None
    assert [token_id for token_id, _ in token.logprob.top] == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_may_have_low_precision_and_are_left_as_they_are(dtype: torch.dtype) -> None:
    logits = some_logits(10, len(VARIETY), VOCABULARY).to(dtype)
    before = logits.clone()

    found = tokens(logits, [Sampler(sampling, [1, 2]) for sampling in VARIETY])

    assert torch.equal(logits, before)
    assert found == tokens(logits.float(), [Sampler(sampling, [1, 2]) for sampling in VARIETY])


def test_no_rows_are_no_tokens() -> None:
    assert sample(torch.empty(0, VOCABULARY), []) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_seed_gives_the_same_tokens_on_the_gpu() -> None:
    logits = some_logits(11, len(VARIETY), 128_256, scale=3)
    on_cpu, on_gpu = ([Sampler(sampling, [1, 2]) for sampling in VARIETY] for _ in range(2))
    for _ in range(5):
        expected, found = tokens(logits, on_cpu), tokens(logits.cuda(), on_gpu)

        assert [token.id for token in found] == [token.id for token in expected]
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.logprob is None) == (theirs.logprob is None)
            if ours.logprob is not None and theirs.logprob is not None:
                assert ours.logprob.logprob == pytest.approx(theirs.logprob.logprob, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_and_device_do_not_show(dtype: torch.dtype) -> None:
    """Penalties were rounded to bfloat16, or failed in float64."""
    logits = torch.stack([some_logits(seed) for seed in range(len(VARIETY))])
    prompts = [list(range(seed, VOCABULARY, 3)) for seed in range(len(VARIETY))]

    def drawn() -> list[Token | GenerationFailed]:
        samplers = [Sampler(sampling, prompt) for sampling, prompt in zip(VARIETY, prompts, strict=True)]
        return [token for _ in range(3) for token in sample(logits, samplers)]

    expected = drawn()
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert drawn() == expected
    finally:
        torch.set_default_dtype(usual)
