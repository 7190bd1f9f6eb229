from dataclasses import replace

import pytest

from tests.bench.figures import Figures, percentile, token_gaps, token_times
from tests.bench.load import Answer, Load


def letters(text: str) -> list[int]:
    """A tokenizer for which each letter is a token."""
    return list(range(1, len(text) + 1))


@pytest.mark.parametrize(("percent", "value"), [(0, 1), (50, 2.5), (95, 3.85), (100, 4)])
def test_percentiles_lie_between_ranks(percent: float, value: float) -> None:
    assert percentile([4, 1, 3, 2], percent) == pytest.approx(value)


def test_nothing_has_no_percentile() -> None:
    assert percentile([], 50) is None


def test_a_token_comes_with_the_piece_that_ends_it() -> None:
    answer = Answer(0, 9, ((1.0, "one"), (2.0, " tw"), (3.0, "o three")))

    assert token_times(answer, [3, 7, 13]) == [1.0, 3.0, 3.0]


def test_tokens_that_come_together_share_the_wait_and_the_first_chunk_has_none() -> None:
    assert token_gaps([1.0, 1.0, 2.0, 4.0, 4.0]) == [1.0, 1.0, 1.0]


def test_figures_of_a_load() -> None:
    warm_up = Answer(0.0, 10.0, ((9.0, "ab"),))
    counted = Answer(10.0, 12.0, ((10.5, "a"), (11.0, "bc"), (12.0, "d")), 20, 4)
    unfinished = Answer(12.0, 16.0, ((13.0, "a"), (16.0, "b")), 30, 2)
    failed = Answer(12.0, 13.0, error="HTTP 500")
    load = Load(1, (warm_up, counted, unfinished, failed), open_s=10.0, close_s=14.0, cpu_share=0.01)

    figures = Figures.of(load, letters, max_tokens=64)

    assert figures.requests_per_s == pytest.approx(1 / 4)
    assert figures.tokens_per_s == pytest.approx(5 / 4)
    assert figures.ttft_p50_s == pytest.approx(0.75)
    assert figures.inter_token_p50_s == pytest.approx(0.625)
    assert figures.stall_p95_s == pytest.approx(2.9)
    assert figures.warm_up_ttft_p95_s == 9.0
    assert (figures.answer_tokens, figures.said_answer_tokens, figures.said_prompt_tokens) == (3, 3, 25)
    assert (figures.finished, figures.errors) == (2, 1)


def test_an_answer_in_one_piece_has_nothing_between_its_tokens() -> None:
    load = Load(1, (Answer(1.0, 2.0, ((2.0, "abc"),)),), open_s=0.0, close_s=3.0, cpu_share=0)

    figures = Figures.of(load, letters, max_tokens=64)

    assert (figures.ttft_p50_s, figures.inter_token_p50_s, figures.stall_p95_s) == (1.0, None, None)


def test_text_of_random_weights_does_not_count_as_more_than_was_asked_for() -> None:
    load = Load(1, (Answer(1.0, 2.0, ((2.0, "abcdef"),)),), open_s=0.0, close_s=3.0, cpu_share=0)

    assert Figures.of(load, letters, max_tokens=4).answer_tokens == 4


def test_the_median_of_repeats_is_that_of_each_figure_and_errors_add_up() -> None:
    load = Load(1, (Answer(1.0, 2.0, ((2.0, "abc"),)),), open_s=0.0, close_s=3.0, cpu_share=0)
    one = Figures.of(load, letters, max_tokens=64)
    repeats = [replace(one, tokens_per_s=speed, errors=1) for speed in (3.0, 1.0, 2.0)]

    middle = Figures.median(repeats)

    assert (middle.tokens_per_s, middle.errors, middle.inter_token_p50_s) == (2.0, 3, None)
