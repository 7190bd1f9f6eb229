import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm.logits import Chooser, candidates, penalise
from llm.sampling import Sampling

VOCABULARY = 500
CPU = torch.device("cpu")


def some_logits(seed: int) -> torch.Tensor:
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0.7),
        Sampling(top_k=10),
        Sampling(top_k=1),
        Sampling(top_p=0.9),
        Sampling(top_p=0.01),
        Sampling(min_p=0.1),
        Sampling(temperature=1.5, top_k=50, top_p=0.8, min_p=0.02),
        Sampling(temperature=0.5, top_p=0.9),
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(sampling: Sampling, seed: int) -> None:
    logits = some_logits(seed)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    scores = warpers(torch.zeros(1, 1, dtype=torch.long), logits[None].clone())  # type: ignore[arg-type]
    expected = scores[0].softmax(-1)

    probabilities, ids = candidates(logits, sampling)

    ours = torch.zeros(VOCABULARY)
    ours[ids] = probabilities / probabilities.sum()
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.1, 2.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, seen = some_logits(0), [3, 7, 7, 499]
    is_seen = torch.zeros(VOCABULARY, dtype=torch.bool)
    is_seen[seen] = True

    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), logits[None].clone())[0]

    torch.testing.assert_close(penalise(logits, is_seen, penalty), expected)


def chosen(sampling: Sampling, steps: int = 20) -> list[int]:
    chooser = Chooser(sampling, [1, 2, 3], vocab_size=VOCABULARY, device=CPU)
    return [chooser.choose(some_logits(step)).id for step in range(steps)]


def test_a_seed_repeats_and_another_seed_differs() -> None:
    assert chosen(Sampling(seed=5)) == chosen(Sampling(seed=5))
    assert chosen(Sampling(seed=5)) != chosen(Sampling(seed=6))


def test_without_a_seed_each_answer_is_another() -> None:
    assert chosen(Sampling(temperature=2)) != chosen(Sampling(temperature=2))


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    chooser = Chooser(Sampling(seed=0), [0], vocab_size=4, device=CPU)

    draws = torch.tensor([chooser.choose(logits).id for _ in range(4000)])

    frequencies = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(frequencies, logits.softmax(-1), atol=0.03, rtol=0)


def test_what_was_generated_counts_as_seen() -> None:
    chooser = Chooser(Sampling(temperature=0, repetition_penalty=2), [0], vocab_size=3, device=CPU)
    logits = torch.tensor([0.0, 3.0, 2.0])

    assert [chooser.choose(logits).id for _ in range(2)] == [1, 2]


def test_logprobs_are_those_of_the_model_before_any_option() -> None:
    logits = some_logits(1)
    chooser = Chooser(
        Sampling(temperature=0.1, top_k=2, repetition_penalty=1.5, logprobs=3), [9], vocab_size=VOCABULARY, device=CPU
    )

    token = chooser.choose(logits)

    expected = logits.log_softmax(-1)
    assert token.logprob is not None
    assert token.logprob.logprob == pytest.approx(float(expected[token.id]))
    assert [token_id for token_id, _ in token.logprob.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=1e-40), Sampling(temperature=1e-7), Sampling(temperature=2, repetition_penalty=0.01)],
    ids=str,
)
def test_options_at_the_edge_of_what_floats_hold_still_choose(sampling: Sampling) -> None:
    """Divided by almost nothing, logits overflowed, and the request failed with an internal error."""
    chooser = Chooser(sampling, [1, 2], vocab_size=VOCABULARY, device=CPU)
    logits = some_logits(0) * 10

    token = chooser.choose(logits)

    if sampling.temperature < 1:
        assert token.id == int(logits.argmax())
