from collections.abc import Mapping

import pytest

from llm import network
from llm.network import HTTPX, REQUESTS, Client, find_trouble, proxy_variable

ENDPOINT = "https://hub.example.com"
SOCKS = "socks5://127.0.0.1:9"


def trouble(client: Client, environment: Mapping[str, str], endpoint: str = ENDPOINT) -> str | None:
    return find_trouble(client, endpoint, "HUB_ENDPOINT", environment)


@pytest.fixture
def _no_socks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "find_spec", lambda name: None)


@pytest.mark.usefixtures("_no_socks")
@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"])
@pytest.mark.parametrize(("client", "package"), [(HTTPX, "socksio"), (REQUESTS, "pysocks")])
def test_socks_needs_a_package_and_it_is_named(client: Client, package: str, variable: str) -> None:
    found = trouble(client, {variable: SOCKS})

    assert found
    assert found.startswith(f"{variable} is '{SOCKS}'")
    assert f"pip install {package}, or unset {variable}" in found


def test_socks_is_no_trouble_where_the_package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "find_spec", lambda name: object())

    assert trouble(HTTPX, {"ALL_PROXY": SOCKS}) is None


@pytest.mark.parametrize("client", [HTTPX, REQUESTS])
@pytest.mark.parametrize(
    "value",
    ["http://", "http://[::1", "http://a:99999", "http://a:0", "http://a b:1", ":3128"],
)
def test_a_proxy_that_is_not_a_url_is_named(client: Client, value: str) -> None:
    found = trouble(client, {"HTTPS_PROXY": value})

    assert found
    assert found.startswith(f"HTTPS_PROXY is {value!r}, which is not the URL of a proxy")


def test_a_proxy_of_an_unsupported_scheme_is_named() -> None:
    found = trouble(HTTPX, {"HTTPS_PROXY": "socks4://a:1"})

    assert found
    assert "use one of http, https, socks5, socks5h" in found


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("ftp://user:secret@proxy:1", "ftp://…@proxy:1"),
        ("user:secret@proxy:port", "…@proxy:port"),
        ("http://user:secret", "http://user:…"),
        ("user:secret", "user:…"),
    ],
)
def test_a_password_is_not_shown(value: str, shown: str) -> None:
    found = trouble(HTTPX, {"HTTPS_PROXY": value})

    assert found
    assert "secret" not in found
    assert repr(shown) in found


@pytest.mark.parametrize("client", [HTTPX, REQUESTS])
@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"HTTPS_PROXY": ""},
        {"HTTPS_PROXY": "proxy:3128"},
        {"HTTPS_PROXY": "http://user:p%40ss@proxy.example.com:3128/"},
        {"https_proxy": "http://a:1", "HTTPS_PROXY": "http://"},
        {"HTTPS_PROXY": "http://", "NO_PROXY": "*"},
        {"FTP_PROXY": "http://"},
        {"SSL_CERT_FILE": __file__, "REQUESTS_CA_BUNDLE": __file__},
    ],
)
def test_what_clients_can_use_is_no_trouble(client: Client, environment: dict[str, str]) -> None:
    assert trouble(client, environment) is None


@pytest.mark.parametrize(
    "environment", [{"HTTP_PROXY": "http://"}, {"HTTPS_PROXY": "http://", "NO_PROXY": "example.com"}]
)
def test_a_proxy_for_other_servers_is_trouble_only_to_clients_that_read_it(environment: dict[str, str]) -> None:
    assert trouble(HTTPX, environment)
    assert trouble(REQUESTS, environment) is None


@pytest.mark.parametrize(
    ("client", "variable"),
    [(HTTPX, "SSL_CERT_FILE"), (HTTPX, "SSL_CERT_DIR"), (REQUESTS, "REQUESTS_CA_BUNDLE"), (REQUESTS, "CURL_CA_BUNDLE")],
)
def test_certificates_that_do_not_exist_are_named(client: Client, variable: str) -> None:
    found = trouble(client, {variable: "/no/such/file"})

    assert found
    assert found.startswith(f"{variable} names '/no/such/file', which does not exist")


@pytest.mark.parametrize("endpoint", ["hub.example.com", "ftp://hub.example.com", "https://", "https://a:port", ""])
def test_an_endpoint_that_is_not_a_url_is_named(endpoint: str) -> None:
    found = trouble(HTTPX, {}, endpoint)

    assert found
    assert found.startswith(f"HUB_ENDPOINT is {endpoint!r}")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"HTTPS_PROXY": "http://a:1", "ALL_PROXY": "http://b:1"}, "HTTPS_PROXY"),
        ({"HTTP_PROXY": "http://a:1", "all_proxy": "http://b:1"}, "all_proxy"),
        ({"HTTPS_PROXY": "http://a:1", "NO_PROXY": "example.com"}, None),
        ({"HTTPS_PROXY": "http://a:1", "no_proxy": "example.org"}, "HTTPS_PROXY"),
    ],
)
def test_the_proxy_that_is_used(environment: dict[str, str], expected: str | None) -> None:
    assert proxy_variable(ENDPOINT, environment) == expected
