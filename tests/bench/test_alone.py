import pytest

from tests.bench.alone import Measurement, Trace, rate, together


def test_decode_is_timed_while_all_rows_decode() -> None:
    early = Trace(0.0, [(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1)])
    late = Trace(0.0, [(2.0, 1), (3.0, 2), (5.0, 1)])

    window = together([early, late])

    assert window == (2.0, 4.0)
    assert rate([early, late], window) == pytest.approx((2 + 2) / 2)


def test_rows_that_were_served_one_after_the_other_have_no_rate() -> None:
    window = together([Trace(0.0, [(1.0, 1), (2.0, 1)]), Trace(0.0, [(3.0, 1), (4.0, 1)])])

    assert window is None
    assert rate([], window) is None


def test_the_part_of_the_limit_is_that_of_the_median() -> None:
    assert Measurement("decode", 1, 128, "tokens/s", (10.0, 30.0, 20.0), limit=80.0).of_limit == 0.25
    assert Measurement("decode", 1, 128, "tokens/s", (), limit=80.0).of_limit is None
