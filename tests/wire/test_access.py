"""Who may call, over the network: every route, by every way to give a key."""

import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from langserve import RemoteRunnable
from langserve.lzstring import LZString

from tests.server import ROOT, Server

HELLO = {"text": "Hi!", "target_language": "German"}
GIVEN = "0123456789abcdef"
LINK = str(LZString.compressToEncodedURIComponent('{"configurable": {}}'))  # type: ignore[no-untyped-call]

PAGES = ["/", "/docs", "/openapi.json", "/metrics", "/favicon.ico"]
OF_A_CHAIN = [
    *(f"{shared}/{schema}_schema" for shared in ("", f"/c/{LINK}") for schema in ("input", "output", "config")),
    *(f"{shared}/playground/" for shared in ("", f"/c/{LINK}")),
    "/playground/assets/nothing.js",
]
CALLS = [
    f"{shared}/{call}"
    for shared in ("", f"/c/{LINK}")
    for call in ("invoke", "batch", "stream", "stream_log", "stream_events")
]
NOT_THERE = [
    ("GET", "/nothing"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/metrics/"),
    ("GET", "/translate/invoke"),
]
ROUTES = [
    *(("GET", path) for path in PAGES),
    *(("GET", f"/{chain}{path}") for chain in ("chat", "translate", "summarize") for path in OF_A_CHAIN),
    *(("POST", f"/{chain}{path}") for chain in ("chat", "translate", "summarize") for path in CALLS),
    *NOT_THERE,
]
"""All there is, and some that there is not: nobody learns without a key which is which."""


def keys(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "serve.py", "keys", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def by_bearer(key: str) -> Mapping[str, str]:
    return {"Authorization": f"Bearer {key}"}


def by_header(key: str) -> Mapping[str, str]:
    return {"X-API-Key": key}


def by_basic(key: str) -> Mapping[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"ada:{key}".encode()).decode()}


WAYS = [by_bearer, by_header, by_basic]


class KeyedServer(Server):
    file: Path
    key: str
    revoked: str


@pytest.fixture(scope="module", autouse=True)
def client() -> Iterator[httpx.Client]:
    """One for all: to make one takes longer than to ask."""
    global asking
    with httpx.Client(timeout=30) as asking:
        yield asking


asking: httpx.Client


@pytest.fixture(scope="module")
def keyed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyedServer]:
    directory = tmp_path_factory.mktemp("keyed-server")
    file = directory / "keys"
    added = {name: keys("add", name, "--file", str(file)) for name in ("ada", "eve")}
    with KeyedServer(
        directory / "log",
        script="tests/scripted_server.py",
        awaited="/ready",
        api_keys_file=str(file),
        api_keys=f"given:{GIVEN}",
        login_rate_limit="",
    ) as server:
        server.file, server.key, server.revoked = file, added["ada"].stdout.strip(), added["eve"].stdout.strip()
        assert get(server, "/docs", by_bearer(server.revoked)).status_code == 200
        assert keys("remove", "eve", "--file", str(file)).returncode == 0
        yield server


def get(server: Server, path: str, headers: Mapping[str, str]) -> httpx.Response:
    return asking.get(f"{server.url}{path}", headers=dict(headers))


def ask(server: Server, method: str, path: str, headers: Mapping[str, str]) -> httpx.Response:
    chain = path.split("/")[1]
    one: Any = {"messages": [["user", "Hi!"]]} if chain == "chat" else {"text": "Hi!"}
    if chain == "translate":
        one = HELLO
    body = {"inputs": [one]} if path.endswith("/batch") else {"input": one}
    return asking.request(method, f"{server.url}{path}", headers=dict(headers), json=body if method == "POST" else None)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_no_route_answers_without_the_right_key(keyed_server: KeyedServer, method: str, path: str) -> None:
    wrong = [way(key) for way in WAYS for key in ("llama-" + "x" * 43, keyed_server.revoked, ".")]
    for headers in ({}, *wrong):
        refused = ask(keyed_server, method, path, headers)
        assert refused.status_code == 401, headers
        assert refused.json()["error"]["type"] == "unauthorized"
        assert refused.headers["www-authenticate"].startswith("Basic realm=")
        assert "x-request-id" in refused.headers


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_answers_with_the_right_key_by_each_way(keyed_server: KeyedServer, method: str, path: str) -> None:
    is_there = (method, path) not in NOT_THERE and not path.endswith("nothing.js")
    for way in WAYS:
        for key in (keyed_server.key, GIVEN):
            answer = ask(keyed_server, method, path, way(key))
            if is_there:
                assert answer.status_code == 200, answer.text
            else:
                assert answer.status_code in (307, 404, 405)


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_whether_it_lives_is_for_everybody(keyed_server: KeyedServer, path: str) -> None:
    assert get(keyed_server, path, {}).status_code == 200
    assert get(keyed_server, path, by_bearer("wrong")).status_code == 200


def test_a_key_works_as_soon_as_it_is_made_and_no_longer_than_it_is_there(keyed_server: KeyedServer) -> None:
    file = str(keyed_server.file)
    key = keys("add", "newcomer", "--file", file).stdout.strip()
    assert ask(keyed_server, "POST", "/translate/invoke", by_header(key)).status_code == 200
    keys("remove", "newcomer", "--file", file)
    assert ask(keyed_server, "POST", "/translate/invoke", by_header(key)).status_code == 401
    assert "key newcomer, " in keyed_server.log.read_text()
    assert key not in keyed_server.log.read_text()


def test_what_a_route_is_called_does_not_tell_whether_it_is_there(keyed_server: KeyedServer) -> None:
    def said(path: str) -> Any:
        error = get(keyed_server, path, {}).json()["error"]
        return {name: value for name, value in error.items() if name != "request_id"}

    assert said("/chat/playground/") == said("/nothing")


async def test_langserves_client_gives_a_key_by_its_headers(keyed_server: KeyedServer) -> None:
    url = f"{keyed_server.url}/translate"
    translate: RemoteRunnable[Any, Any] = RemoteRunnable(url, headers=dict(by_bearer(keyed_server.key)))
    assert translate.invoke(HELLO) == "Hi!"
    assert "".join([chunk async for chunk in translate.astream(HELLO)]) == "Hi!"
    assert translate.batch([HELLO]) == ["Hi!"]
    stranger: RemoteRunnable[Any, Any] = RemoteRunnable(url)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        stranger.invoke(HELLO)
    with pytest.raises(httpx.HTTPStatusError, match="401"):
        list(stranger.stream(HELLO))


def test_the_metrics_name_the_key_and_not_the_secret(keyed_server: KeyedServer) -> None:
    ask(keyed_server, "POST", "/translate/invoke", by_header(GIVEN))
    metrics = get(keyed_server, "/metrics", by_header(GIVEN)).text
    assert re.search(r'serve_generation_tokens_total\{chain="translate",key="given"\} \d', metrics)
    assert GIVEN not in metrics


def test_failed_log_ins_and_pages_are_limited_and_health_is_not(tmp_path: Path) -> None:
    with Server(
        tmp_path / "log",
        script="tests/scripted_server.py",
        api_keys=f"ada:{GIVEN},bob:{GIVEN}-of-bob",
        login_rate_limit="3/hour",
        page_rate_limit="5/hour",
        operator_keys="ada,nobody",
    ) as server:
        assert "SERVE_OPERATOR_KEYS: there is no key named nobody" in server.log.read_text()
        wrong = {**by_header("wrong"), "X-Forwarded-For": "203.0.113.1"}
        answers = [get(server, "/docs", wrong) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [401, 401, 401, 429, 429]
        assert answers[-1].json()["error"]["type"] == "rate_limited"
        assert int(answers[-1].headers["retry-after"]) > 0
        assert get(server, "/docs", {**wrong, "X-Forwarded-For": "203.0.113.2"}).status_code == 401
        right = {**wrong, **by_header(GIVEN)}
        assert [get(server, "/docs", right).status_code for _ in range(6)] == [200] * 5 + [429]
        assert ask(server, "POST", "/translate/invoke", right).status_code == 200
        assert all(get(server, path, right).status_code == 200 for path in ["/health", "/ready"] * 10)


@pytest.mark.parametrize("forwarded", ["1.2.3.4 forged", "<b>x</b>", "fe80::1%forged", "forged:1", "x" * 15_000])
def test_what_a_proxy_forwards_is_logged_only_if_it_is_an_address(
    keyed_server: KeyedServer, scripted_server: Server, forwarded: str
) -> None:
    get(keyed_server, "/docs", {"X-Forwarded-For": forwarded, "X-Request-ID": "forwarder"})
    log = keyed_server.log.read_text()
    assert "forged" not in log
    assert forwarded not in log


def test_a_page_of_another_site_cannot_make_a_browser_call(keyed_server: KeyedServer, scripted_server: Server) -> None:
    for server, headers in ((keyed_server, by_basic(GIVEN)), (scripted_server, {})):
        for foreign in (
            {"Origin": "https://evil.example"},
            {"Sec-Fetch-Site": "cross-site"},
            {"Sec-Fetch-Site": "same-site", "Origin": server.url},
        ):
            refused = ask(server, "POST", "/translate/invoke", {**headers, **foreign})
            assert refused.status_code == 403
            assert refused.json()["error"]["type"] == "forbidden_origin"
        own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
        assert ask(server, "POST", "/translate/invoke", {**headers, **own}).status_code == 200


def test_without_keys_a_name_that_points_here_is_no_name_of_the_service(scripted_server: Server) -> None:
    refused = get(scripted_server, "/translate/input_schema", {"Host": "rebound.example"})
    assert refused.status_code == 421
    assert refused.json()["error"]["type"] == "misdirected"


def test_other_sites_may_call_where_they_are_listed(tmp_path: Path) -> None:
    origin = "https://app.example"
    with Server(
        tmp_path / "log", script="tests/scripted_server.py", api_keys=f"app:{GIVEN}", cors_origins=origin
    ) as server:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "authorization,content-type"
        preflight = httpx.options(f"{server.url}/translate/stream", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == origin
        foreign = {"Origin": origin, "Sec-Fetch-Site": "cross-site"}
        answer = ask(server, "POST", "/translate/invoke", {**by_bearer(GIVEN), **foreign})
        assert answer.json()["output"] == "Hi!"
        assert answer.headers["access-control-allow-origin"] == origin
        refused = ask(server, "POST", "/translate/invoke", foreign)
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == origin, "or the page could not read why"
        stranger = httpx.options(f"{server.url}/translate/stream", headers={**asked, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_this_machine_it_does_not_start_without_keys(host: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "serve.py"), "--host", host, "--port", "0"]
    refused = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "can be reached from other machines" in line
    assert "--insecure" in line


def test_a_key_can_be_made_where_there_is_none_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_HOST", "0.0.0.0")
    monkeypatch.setenv("SERVE_API_KEYS_FILE", str(tmp_path / "keys"))
    assert keys("add", "ada").stdout.startswith("llama-")
    assert keys("list").stdout == "ada\n"


@pytest.mark.parametrize("settings", [{"insecure": "true"}, {"api_keys": f"ada:{GIVEN}"}])
def test_beyond_this_machine_it_starts_with_keys_or_if_told_to(tmp_path: Path, settings: dict[str, Any]) -> None:
    with Server(tmp_path / "log", script="tests/scripted_server.py", host="0.0.0.0", **settings) as server:
        answer = ask(server, "POST", "/translate/invoke", by_header(GIVEN))
        assert answer.json()["output"] == "Hi!"
        refused = ask(server, "POST", "/translate/invoke", {})
        assert refused.status_code == (200 if "insecure" in settings else 401)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"api_keys": "ada"}, "SERVE_API_KEYS"),
        ({"api_keys": "ada:short"}, "16 or more"),
        ({"api_keys_file": "/nowhere/keys"}, "/nowhere/keys"),
        ({"redis_url": "redis://:shorty/@h:1/0"}, "SERVE_REDIS_URL is no URL"),
        ({"max_batch": "3,chta=2"}, "there is no chain 'chta'"),
        ({"operator_keys": "ada"}, "SERVE_OPERATOR_KEYS (--operator-keys): there are no keys"),
        ({"operator_keys": "a b", "api_keys": f"ada:{GIVEN}"}, "'a b' is no name of a key"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line_and_ends_the_process(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    server = Server(tmp_path / "log", script="tests/scripted_server.py", **settings)
    with pytest.raises(RuntimeError, match="the server ended with 2"), server:
        pass
    log = server.log.read_text()
    assert said in log
    assert "Traceback" not in log
    assert "short" not in log


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl is installed on this machine")
def test_https_is_served_where_there_is_a_certificate(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True, timeout=60)
    server = Server(
        tmp_path / "log",
        script="tests/scripted_server.py",
        certificate=certificate,
        ssl_certfile=str(certificate),
        ssl_keyfile=str(key),
    )
    with server:
        assert server.url.startswith("https://")
        assert f"Serving on {server.url}" in server.log.read_text()
        with httpx.stream(
            "POST", f"{server.url}/translate/stream", json={"input": HELLO}, verify=server.trust
        ) as answer:
            assert b"event: end" in answer.read()
