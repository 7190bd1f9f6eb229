import pytest

from service.entry.limits import limit_of, parse_per_chain
from service.settings import Settings, SettingsError


def test_a_limit_holds_for_all_chains_or_for_one() -> None:
    assert parse_per_chain(int, "5") == (5, {})
    assert parse_per_chain(float, " 600, chat=0.5 ,translate = 7 ") == (600.0, {"chat": 0.5, "translate": 7.0})
    assert limit_of(int, "5,chat=3", "chat") == 3
    assert limit_of(int, "5,chat=3", "translate") == 5


@pytest.mark.parametrize("value", ["", "chat=5", "5,6", "5,chat=", "0", "5,chat=-1", "inf", "1.5", "5;6", "nan"])
def test_what_is_no_limit_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match=r"number|more than 0"):
        parse_per_chain(int, value)


def test_the_settings_give_each_chain_its_limits() -> None:
    settings = Settings(timeout_s="600,chat=30", max_batch="8,translate=2")
    assert settings.limits("chat").timeout_s == 30
    assert settings.limits("chat").max_batch == 8
    assert settings.limits("translate").timeout_s == 600
    assert settings.limits("translate").max_batch == 2


def test_a_limit_for_a_chain_that_there_is_not_is_refused() -> None:
    Settings().check_chains(["mine"])
    with pytest.raises(SettingsError, match="SERVE_MAX_BATCH: there is no chain 'chta', but chat, translate"):
        Settings(max_batch="8,chta=2").check_chains(["chat", "translate"])
