from pathlib import Path

import pytest

from service.settings import Settings, read_settings


@pytest.fixture(autouse=True)
def _nothing_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"SERVE_{name.upper()}", raising=False)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_are_safe() -> None:
    settings = read_settings([])
    assert settings.host == "127.0.0.1"
    assert settings.port == 8000
    assert settings.model == "embedded"
    assert not settings.langsmith
    assert settings.limits("translate").max_body == 4 * 1024 * 1024


def test_a_flag_comes_before_the_environment_and_that_before_dot_env(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("SERVE_PORT=1\nSERVE_MAX_QUEUE=2\nSERVE_MAX_BATCH=3\nOPENAI_API_KEY=x\n")
    monkeypatch.setenv("SERVE_PORT", "4")
    monkeypatch.setenv("SERVE_MAX_QUEUE", "5")
    settings = read_settings(["--port", "6"])
    assert (settings.port, settings.max_queue, settings.limits("chat").max_batch) == (6, 5, 3)


def test_a_switch_needs_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_settings(["--langsmith"]).langsmith
    monkeypatch.setenv("SERVE_LANGSMITH", "1")
    assert read_settings([]).langsmith
    assert not read_settings(["--no-langsmith"]).langsmith


def test_settings_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_settings([]).port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("port", "70000", "less than or equal to 65535"),
        ("port", "http", "valid integer"),
        ("model", "", "at least 1 character"),
        ("dtype", "int3", "'float16'"),
        ("device", "tpu", "match pattern"),
        ("max_context", "1", "greater than or equal to 16"),
        ("max_body", "0", "more than 0 and finite"),
        ("timeout_s", "nan", "more than 0 and finite"),
        ("timeout_s", "0", "more than 0 and finite"),
        ("timeout_s", "chat=5", "one number for all chains, got 0"),
        ("max_batch", "5,6", "one number for all chains, got 2"),
        ("max_batch", "5,chat=many", "'chat=many' is none"),
        ("rate_limit", "many", "couldn't parse"),
        ("cors_origins", "https://a.example/", "is no origin"),
        ("max_batch", "5,chat=1,chat=2", "chat has two"),
        ("allowed_hosts", "a b", "is no host"),
        ("ssl_certfile", "./nothing.pem", "not point to a file"),
        ("root_path", "llama", "match pattern"),
        ("root_path", "/llama/", "match pattern"),
        ("log_level", "loud", "'debug'"),
    ],
)
@pytest.mark.parametrize("is_flag", [True, False])
def test_a_wrong_setting_is_named_with_its_limit_and_its_value(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    said: str,
    is_flag: bool,
) -> None:
    flag, variable = f"--{name.replace('_', '-')}", f"SERVE_{name.upper()}"
    if not is_flag:
        monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit) as exit_:
        read_settings([f"{flag}={value}"] if is_flag else [])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"serve.py: {variable} ({flag}): ")
    assert said in line
    assert f"got {value!r}" in line


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_settings(["--colour", "red"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --colour red" in capsys.readouterr().err


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        read_settings(["--help"])
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for name, setting in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in said
        assert setting.description
        assert setting.description in said
