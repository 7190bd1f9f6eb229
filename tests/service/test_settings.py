from pathlib import Path

import pytest

from service.entry.body_reader import VALUE_BYTES
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
        ("rate_limit", "many", "must be a rate"),
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


def service_links(service: str) -> dict[str, str]:
    """What Kubernetes puts into the containers of a namespace for a service with one named port."""
    return {
        f"{service}_SERVICE_HOST": "10.96.0.1",
        f"{service}_SERVICE_PORT": "8000",
        f"{service}_SERVICE_PORT_HTTP": "8000",
        f"{service}_PORT": "tcp://10.96.0.1:8000",
        f"{service}_PORT_8000_TCP": "tcp://10.96.0.1:8000",
        f"{service}_PORT_8000_TCP_PROTO": "tcp",
        f"{service}_PORT_8000_TCP_PORT": "8000",
        f"{service}_PORT_8000_TCP_ADDR": "fd00::1",
    }


def test_service_links_of_kubernetes_are_not_settings(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service called `serve` is likely, and its SERVE_PORT is a URL."""
    for service in ("SERVE", "SERVE_MODEL", "SERVE_MAX"):
        for name, value in service_links(service).items():
            monkeypatch.setenv(name, value)

    settings = read_settings([])

    assert settings.port == 8000
    assert settings.model == "embedded"
    (line,) = capsys.readouterr().err.splitlines()
    assert "SERVE_PORT is 'tcp://10.96.0.1:8000', a service link of Kubernetes" in line
    assert read_settings(["--port", "9000"]).port == 9000


def test_dot_env_counts_where_the_environment_has_a_service_link(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text("SERVE_PORT=9001\n")
    monkeypatch.setenv("SERVE_PORT", "udp://10.96.0.1:8000")

    assert read_settings([]).port == 9001


@pytest.mark.parametrize("is_flag", [True, False])
def test_what_looks_like_a_service_link_is_refused_where_kubernetes_writes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], is_flag: bool
) -> None:
    link = "tcp://10.96.0.1:8000"
    (tmp_path / ".env").write_text("" if is_flag else f"SERVE_PORT={link}\n")

    with pytest.raises(SystemExit) as exit_:
        read_settings([f"--port={link}"] if is_flag else [])

    assert exit_.value.code == 2
    assert f"got '{link}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SERVE_HTTP_PORT", "9000"),
        ("SERVE_SERVICE_HOST", "my host"),
        ("SERVE_PROT", "9000"),
        ("SERVE_MODELS", "tcp://a"),
    ],
)
def test_a_setting_that_does_not_exist_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    read_settings([])

    assert capsys.readouterr().err == f"serve.py: there is no setting {name}: it is ignored\n"


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


def test_the_budget_of_bodies_follows_from_the_largest_body() -> None:
    assert Settings(max_body="1000").body_total == 4 * (4 * 1000 + VALUE_BYTES * 1000)
    assert Settings(max_body="1000,chat=4000").body_total == 4 * (4 * 4000 + VALUE_BYTES * 4000)
    assert Settings(max_body="1000", max_body_total=900_000).body_total == 900_000
    with pytest.raises(ValueError, match=r"SERVE_MAX_BODY_TOTAL.*at least 608000.*got 607999"):
        Settings(max_body="1000", max_body_total=607_999)
