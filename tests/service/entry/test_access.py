import base64
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import example, given
from hypothesis import strategies as st

from service.entry.access import Access
from service.entry.keys import KeyRing, digest_of
from service.errors import Refusal

KEY = "llama-the-key-of-ada"
OTHER = "llama-the-key-of-bea"
KEYS = f"ada:{KEY},bea:{OTHER}"
PATH = "/chat/invoke"


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def call(
    *headers: tuple[str, str | bytes],
    method: str = "POST",
    path: str = PATH,
    root_path: str = "",
    keys: KeyRing | None = None,
    allowed_hosts: Sequence[str] = (),
    cors_origins: Sequence[str] = (),
    insecure: bool = False,
    access: Access | None = None,
    client: str = "192.0.2.1",
) -> str:
    """Send one request through; the name that it came in with. `access` is used in place of one made for it."""
    names: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        names.append(scope["state"]["key"])

    encoded = [(name.encode(), value.encode() if isinstance(value, str) else value) for name, value in headers]
    scope: Any = {"type": "http", "method": method, "path": path, "root_path": root_path, "headers": encoded}
    scope["client"] = (client, 4000)
    if access is None:
        access = Access(app, KeyRing(None, KEYS) if keys is None else keys, allowed_hosts, cors_origins, insecure)
    else:
        access.app = app
    await access(scope, None, None)  # type: ignore[arg-type]  # it neither receives nor sends
    (name,) = names
    return name


async def refusal(*headers: tuple[str, str | bytes], **given: Any) -> Any:
    with pytest.raises(Refusal) as refused:
        await call(*headers, **given)
    return refused.value.problem


def limited(keys: str = KEYS, **limits: str) -> Access:
    return Access(None, KeyRing(None, keys), (), (), False, **limits)  # type: ignore[arg-type]  # `call` gives it one


WRONG = ("x-api-key", "llama-a-wrong-key-00")


async def test_failed_log_ins_are_limited_per_address() -> None:
    access = limited(login_rate_limit="3/hour")
    for _ in range(3):
        assert (await refusal(WRONG, access=access)).status == 401
    problem = await refusal(WRONG, access=access)
    assert (problem.status, problem.kind) == (429, "rate_limited")
    assert 1 <= int(problem.headers["Retry-After"]) <= 1200
    assert "SERVE_LOGIN_RATE_LIMIT" in problem.message
    assert "3/hour" in problem.message
    assert (await refusal(("authorization", "Bearer x"), method="GET", access=access)).status == 429
    assert (await refusal(WRONG, access=access, client="192.0.2.2")).status == 401


async def test_a_right_key_is_served_from_an_address_with_too_many_failed_log_ins() -> None:
    """Or whoever shares an address, behind a company's proxy say, could lock everybody else there out."""
    access = limited(login_rate_limit="1/hour")
    assert (await refusal(WRONG, access=access)).status == 401
    assert (await refusal(WRONG, access=access)).status == 429
    assert await call(("x-api-key", KEY), access=access) == "ada"
    assert (await refusal(WRONG, access=access)).status == 429


async def test_right_keys_and_missing_keys_are_no_failed_log_ins() -> None:
    access = limited(login_rate_limit="1/hour")
    for _ in range(5):
        await call(("x-api-key", KEY), access=access)
        assert (await refusal(access=access)).status == 401
    assert (await refusal(WRONG, access=access)).status == 401


async def test_an_ipv6_network_is_one_address() -> None:
    access = limited(login_rate_limit="1/hour")
    assert (await refusal(WRONG, access=access, client="2001:db8:0:1::1")).status == 401
    assert (await refusal(WRONG, access=access, client="2001:db8:0:1:ffff::2")).status == 429
    assert (await refusal(WRONG, access=access, client="2001:db8:0:2::1")).status == 401


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "DELETE"])
async def test_pages_are_limited_per_key(method: str) -> None:
    access = limited(page_rate_limit="2/hour")
    for _ in range(2):
        assert await call(("x-api-key", KEY), method=method, path="/docs", access=access) == "ada"
    problem = await refusal(("x-api-key", KEY), method=method, path="/chat/input_schema", access=access)
    assert (problem.status, problem.kind) == (429, "rate_limited")
    assert 1 <= int(problem.headers["Retry-After"]) <= 1800
    assert "SERVE_PAGE_RATE_LIMIT" in problem.message
    assert await call(("x-api-key", OTHER), method=method, access=access) == "bea"
    assert await call(("x-api-key", KEY), method="POST", access=access) == "ada", "calls have a limit of their own"
    assert await call(method="GET", path="/health", access=access) == ""


async def test_where_there_is_no_key_pages_are_limited_per_address() -> None:
    for access, served in ((limited("", page_rate_limit="2/hour"), True), (limited(page_rate_limit="2/hour"), False)):
        for _ in range(2):
            if served:
                assert await call(method="GET", access=access) == ""
            else:
                assert (await refusal(method="GET", access=access)).status == 401
        assert (await refusal(method="GET", access=access)).status == 429
        assert await call(method="GET", path="/health", access=access) == ""
        if served:
            assert await call(method="GET", access=access, client="192.0.2.2") == ""


async def test_a_client_without_an_address_is_counted_too() -> None:
    access = limited("", page_rate_limit="1/hour")
    await call(method="GET", access=access, client="")
    assert (await refusal(method="GET", access=access, client="")).status == 429


@pytest.mark.parametrize(
    "header",
    [
        ("x-api-key", f"{KEY} "),
        ("x-api-key", f"\t{KEY} \t"),
        ("authorization", f"Bearer {KEY}\t"),
        ("authorization", f" Bearer\t {KEY} "),
        ("authorization", basic("anyone", KEY) + " \t"),
    ],
)
async def test_white_space_around_a_key_is_ignored(header: tuple[str, str]) -> None:
    assert await call(header) == "ada"


@pytest.mark.parametrize("space", ["\xa0", "\x0b", "\x85", " x"])
async def test_what_is_no_white_space_in_http_is_part_of_the_key(space: str) -> None:
    assert (await refusal(("x-api-key", (KEY + space).encode("latin-1")))).status == 401


WAYS = [
    lambda key: ("x-api-key", key),
    lambda key: ("authorization", f"Bearer {key}"),
    lambda key: ("authorization", f"bEARER  {key}"),
    lambda key: ("authorization", basic("anyone", key)),
    lambda key: ("authorization", basic("jürgen", key).replace("Basic", "bAsIc")),
    lambda key: ("authorization", basic(key, "")),
    lambda key: ("authorization", basic("", key)),
]


@pytest.mark.parametrize("way", WAYS)
async def test_a_key_is_taken_in_each_way_and_its_name_kept(way: Any) -> None:
    assert await call(way(KEY)) == "ada"
    assert await call(way(OTHER)) == "bea"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("key", ["", "llama-another-key-00", KEY.upper(), KEY[:-1], KEY + "x", "ada", "ключ"])
async def test_a_wrong_key_is_refused_in_each_way(way: Any, key: str) -> None:
    problem = await refusal(way(key))
    assert (problem.status, problem.kind) == (401, "unauthorized")
    assert "not valid" in problem.message
    assert KEY not in problem.message


@pytest.mark.parametrize("way", WAYS)
async def test_a_revoked_key_is_refused_in_each_way(way: Any, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"ada:sha256:{digest_of(KEY).hex()}\n")
    keys = KeyRing(file)
    assert await call(way(KEY), keys=keys) == "ada"
    file.write_text("")
    assert (await refusal(way(KEY), keys=keys)).status == 401


@pytest.mark.parametrize("way", WAYS)
async def test_an_empty_key_is_none_even_if_the_file_has_its_digest(way: Any, tmp_path: Path) -> None:
    """`printf "$KEY" | sha256sum` with no KEY set makes such a line."""
    (tmp_path / "keys").write_text(f"ada:sha256:{digest_of('').hex()}\n")
    assert (await refusal(way(""), keys=KeyRing(tmp_path / "keys"))).status == 401


async def test_a_missing_key_is_refused_and_told_how_to_be_given() -> None:
    problem = await refusal()
    assert (problem.status, problem.kind) == (401, "unauthorized")
    assert "this request has none" in problem.message
    for way in ("X-API-Key", "Bearer", "Basic"):
        assert way in problem.message
    assert problem.headers == {
        "WWW-Authenticate": 'Basic realm="llama3-langserve", charset="UTF-8", Bearer realm="llama3-langserve"'
    }


async def test_the_first_way_that_is_used_is_the_one_that_counts() -> None:
    right, wrong = f"Bearer {KEY}", "Bearer nobody"
    assert await call(("x-api-key", KEY), ("authorization", wrong)) == "ada"
    assert await call(("x-api-key", KEY), ("authorization", wrong), ("authorization", wrong)) == "ada"
    assert (await refusal(("x-api-key", "nobody"), ("authorization", right))).status == 401
    assert (await refusal(("x-api-key", ""), ("authorization", right))).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        [("x-api-key", KEY), ("x-api-key", KEY)],
        [("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")],
        [("authorization", f"Bearer {KEY}"), ("authorization", basic("", KEY))],
        [("authorization", f"Bearer {KEY}, Bearer {KEY}")],
        [("authorization", KEY)],
        [("authorization", f"Token {KEY}")],
        [("authorization", f"Bearer:{KEY}")],
        [("authorization", "Basic")],
        [("authorization", "Basic " + basic("a", KEY).removeprefix("Basic ").rstrip("="))],
        [("authorization", f"Basic :{KEY}")],
        [("authorization", basic("", KEY) + "!")],
        [("authorization", b"Basic " + base64.b64encode(b"\xff:" + KEY.encode()))],
        [("authorization", b"Basic \xff\xfe")],
        [("authorization", b"Bearer \xff\xfe")],
        [("x-api-key", b"\xff\x00")],
        [("authorization", "Basic " + "A" * 100_001)],
    ],
)
async def test_a_key_that_cannot_be_read_is_not_valid(headers: Any) -> None:
    assert (await refusal(*headers)).kind == "unauthorized"


HEADER_VALUES = st.one_of(
    st.binary(max_size=60),
    st.binary(max_size=60).map(lambda junk: b"Basic " + base64.b64encode(junk)),
    st.tuples(st.sampled_from([b"Basic", b"Bearer", b"basic\t", b""]), st.binary(max_size=40)).map(b" ".join),
)


@given(
    st.lists(st.tuples(st.sampled_from(["x-api-key", "authorization", "origin", "host"]), HEADER_VALUES), max_size=4)
)
@example([("authorization", b"Basic Og==")])
async def test_no_header_gets_anything_but_a_refusal(headers: list[tuple[str, bytes]]) -> None:
    assert (await refusal(*headers, allowed_hosts=["example.com"])).status in (401, 403, 421)


@given(st.lists(st.tuples(st.sampled_from(["host", "origin", "sec-fetch-site"]), st.binary(max_size=20)), max_size=3))
@example([("host", b"[::1"), ("origin", b"http://[::1")])
@example([("host", b"[1.2]"), ("origin", b"https://[zz]:99999999")])
@example([("host", b"a:b:c")])
async def test_no_header_breaks_a_service_that_needs_no_key(headers: list[tuple[str, bytes]]) -> None:
    with contextlib.suppress(Refusal):
        assert await call(*headers, keys=KeyRing(None)) == ""


@pytest.mark.parametrize("path", ["/health", "/ready"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
async def test_health_needs_no_key_no_name_and_no_origin(path: str, method: str) -> None:
    headers = [("host", "10.0.0.7:8000"), ("origin", "https://evil.example"), ("sec-fetch-site", "cross-site")]
    assert await call(*headers, method=method, path=path, allowed_hosts=["example.com"]) == ""
    assert await call(*headers, method=method, path=path, keys=KeyRing(None)) == ""
    assert await call(method=method, path=f"/llama{path}", root_path="/llama") == ""


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/Health",
        "/health/",
        "//health",
        "/health\n",
        "/health?",
        "/health;x",
        "/health/../metrics",
        "/health/..",
        "/x/../health",
        "/./health",
        "/health%2F",
        "/%68ealth",
        "/healthz",
        "/chat/health",
        "/metrics",
        "/docs",
        "http://llama/health",
    ],
)
async def test_every_other_path_needs_a_key(path: str) -> None:
    for method in ("GET", "OPTIONS", "POST"):
        assert (await refusal(method=method, path=path)).status == 401
    assert (await refusal(path=f"/llama{path}", root_path="/llama")).status == 401


@pytest.mark.parametrize(
    ("root_path", "prefix"), [("", ""), ("/llama", "/llama"), ("/health", "/health"), ("/llama", ""), ("/h", "/h")]
)
@pytest.mark.parametrize(
    "target",
    ["/health", "/%68ealth", "/health/", "//health", "/health%0A", "/health%2F..%2Fx", "/x/%2e%2e/health"],
)
async def test_what_is_free_is_what_routing_takes_for_health(root_path: str, prefix: str, target: str) -> None:
    app = FastAPI()
    app.add_middleware(Access, keys=KeyRing(None, KEYS), allowed_hosts=(), cors_origins=(), insecure=False)
    app.add_api_route("/health", lambda: "well")
    app.add_api_route("/{path:path}", lambda path: "secret")
    transport = httpx.ASGITransport(app, root_path=root_path)
    async with httpx.AsyncClient(transport=transport, base_url="http://llama") as client:
        assert (await client.get(prefix + "/chat", headers={"X-API-Key": KEY})).json() == "secret"
        if target in ("/health", "/%68ealth"):
            assert (await client.get(prefix + target)).json() == "well"
        else:
            with pytest.raises(Refusal):
                await client.get(prefix + target)


async def test_a_websocket_is_closed_and_the_lifespan_goes_on() -> None:
    called: list[str] = []
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        called.append(scope["type"])

    async def send(message: Any) -> None:
        sent.append(message)

    access = Access(app, KeyRing(None), (), ("*",), True)
    await access({"type": "websocket", "path": "/health", "headers": []}, None, send)  # type: ignore[arg-type]
    await access({"type": "lifespan"}, None, send)  # type: ignore[arg-type]
    assert called == ["lifespan"]
    assert sent == [{"type": "websocket.close", "code": 1008}]


OWN_NAMES = [
    "localhost",
    "LOCALHOST:8000",
    "localhost.",
    "llama.localhost:8000",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.1.2.3",
    "[::1]",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]:8000",
]

FOREIGN_NAMES = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "notlocalhost",
    "192.168.1.5:8000",
    "0.0.0.0",
    "128.0.0.1",
    "[::2]",
    "[::1",
    "[::1]evil.example",
    "::1",
    "localhost@evil.example",
    "localhost:8000:1",
    "localhost evil.example",
    "localhost/",
    "",
    b"localhost\xff",
]


@pytest.mark.parametrize("host", OWN_NAMES)
async def test_without_keys_loopback_is_served(host: str) -> None:
    assert await call(("host", host), keys=KeyRing(None)) == ""


@pytest.mark.parametrize("host", FOREIGN_NAMES)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
async def test_without_keys_a_page_that_points_its_name_here_is_refused(host: str | bytes, method: str) -> None:
    problem = await refusal(("host", host), method=method, keys=KeyRing(None))
    assert (problem.status, problem.kind) == (421, "misdirected")
    assert "SERVE_ALLOWED_HOSTS" in problem.message


async def test_two_hosts_are_none() -> None:
    assert (await refusal(("host", "localhost"), ("host", "localhost"), keys=KeyRing(None))).status == 421


async def test_a_host_is_shown_short() -> None:
    problem = await refusal(("host", "evil.example"), keys=KeyRing(None))
    assert "'evil.example'" in problem.message
    assert len((await refusal(("host", "e" * 5000), keys=KeyRing(None))).message) < 300


async def test_a_program_that_sends_no_host_is_served() -> None:
    """Browsers, against which the check is, always send one; HTTP/1.0 probes do not."""
    assert await call(keys=KeyRing(None)) == ""
    assert await call(("x-api-key", KEY), allowed_hosts=["example.com"]) == "ada"


@pytest.mark.parametrize(
    ("pattern", "host", "is_allowed"),
    [
        ("example.com", "example.com", True),
        ("Example.com.", "eXample.COM:8443", True),
        ("example.com:8000", "example.com", True),
        ("example.com", "www.example.com", False),
        ("example.com", "badexample.com", False),
        ("*.example.com", "www.example.com", True),
        ("*.example.com", "a.b.example.com:80", True),
        ("*.example.com", "example.com", False),
        ("*.example.com", "badexample.com", False),
        ("*", "anything.example", True),
        ("*", "[", False),
        ("192.168.1.5", "192.168.1.5:8000", True),
        ("fd00::1", "[fd00:0::1]:8000", True),
        ("[fd00::1]", "[fd00::1]", True),
        ("example.com", "localhost", True),
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
async def test_other_names_can_be_allowed(pattern: str, host: str, is_allowed: bool, is_open: bool) -> None:
    keys = KeyRing(None) if is_open else KeyRing(None, KEYS)
    headers = [("host", host), ("x-api-key", KEY)]
    given: Any = {"keys": keys, "allowed_hosts": ["other.example", pattern]}
    if is_allowed:
        assert await call(*headers, **given) == ("" if is_open else "ada")
    else:
        assert (await refusal(*headers, **given)).status == 421


async def test_a_name_is_checked_only_where_that_protects() -> None:
    assert await call(("host", "any.example"), ("x-api-key", KEY)) == "ada"
    assert await call(("host", "any.example"), keys=KeyRing(None), insecure=True) == ""
    listed: Any = {"keys": KeyRing(None), "insecure": True, "allowed_hosts": ["example.com"]}
    assert (await refusal(("host", "any.example"), **listed)).status == 421


@pytest.mark.parametrize("host", ["", "http://example.com", "example.com/", "ex*mple.com", "*example.com", "*.", "a b"])
def test_a_name_that_no_host_can_have_is_refused_at_the_start(host: str) -> None:
    with pytest.raises(ValueError, match="is no host"):
        Access(None, KeyRing(None), [host], (), False)  # type: ignore[arg-type]


OWN = ("host", "llama.example:8000")
GOOD, EVIL = "https://good.example", "https://evil.example"


@pytest.mark.parametrize(
    ("headers", "is_allowed"),
    [
        ([], True),  # curl, RemoteRunnable
        ([("sec-fetch-site", "same-origin"), ("origin", EVIL)], True),
        ([("sec-fetch-site", "none")], True),
        ([("sec-fetch-site", "cross-site"), ("origin", EVIL)], False),
        ([("sec-fetch-site", "cross-site")], False),
        ([("sec-fetch-site", "cross-site"), ("origin", "null")], False),
        ([("sec-fetch-site", "cross-site"), ("origin", "http://llama.example:8000")], False),
        ([("sec-fetch-site", "same-site"), ("origin", "https://www.llama.example")], False),
        ([("sec-fetch-site", "Same-Origin"), ("origin", EVIL)], False),
        ([("sec-fetch-site", "cross-site"), ("origin", GOOD)], True),
        ([("sec-fetch-site", "same-site"), ("origin", GOOD)], True),
        ([("origin", "http://llama.example:8000")], True),
        ([("origin", "https://llama.example:8000")], True),
        ([("origin", "http://llama.example")], False),
        ([("origin", "http://llama.example:9000")], False),
        ([("origin", "http://llama.example:8000.evil.example")], False),
        ([("origin", "llama.example:8000")], False),
        ([("origin", EVIL)], False),
        ([("origin", "null")], False),
        ([("origin", GOOD)], True),
        ([("origin", GOOD + ".evil.example")], False),
        ([("origin", GOOD + ":444")], False),
    ],
)
@pytest.mark.parametrize("is_open", [True, False])
async def test_only_pages_of_allowed_origins_may_send(headers: Any, is_allowed: bool, is_open: bool) -> None:
    keys = KeyRing(None) if is_open else KeyRing(None, KEYS)
    given: Any = {"keys": keys, "cors_origins": ["https://other.example", GOOD], "insecure": True}
    authorization = ("authorization", basic("", KEY))
    if is_allowed:
        assert await call(OWN, authorization, *headers, **given) == ("" if is_open else "ada")
    else:
        problem = await refusal(OWN, authorization, *headers, **given)
        assert (problem.status, problem.kind) == (403, "forbidden_origin")
        assert "SERVE_CORS_ORIGINS" in problem.message
        assert "Host" in problem.message
    for method in ("GET", "HEAD", "OPTIONS"):
        assert await call(OWN, authorization, *headers, method=method, **given) == ("" if is_open else "ada")


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("llama.example", "https://llama.example"),
        ("llama.example:443", "https://llama.example"),
        ("llama.example:80", "http://llama.example"),
        ("LLAMA.example", "http://llama.example"),
        ("[::1]:8000", "http://[::1]:8000"),
    ],
)
async def test_an_origin_that_is_the_host_is_its_own_however_it_is_spelled(host: str, origin: str) -> None:
    assert await call(("host", host), ("origin", origin), ("x-api-key", KEY)) == "ada"


async def test_without_a_host_no_origin_is_the_own_one() -> None:
    for origin in (EVIL, "null", "http://"):
        assert (await refusal(("origin", origin), ("x-api-key", KEY))).status == 403


@pytest.mark.parametrize("site", [[], [("sec-fetch-site", "cross-site")]])
async def test_any_page_is_for_pages_that_give_the_key_themselves(site: Any) -> None:
    """A browser adds Basic to what any page sends: with it, every page could use the key of whoever looks at it."""
    page = [OWN, ("origin", EVIL), *site]
    assert await call(*page, ("x-api-key", KEY), cors_origins=["*"]) == "ada"
    assert await call(*page, ("authorization", f"Bearer {KEY}"), cors_origins=["*"]) == "ada"
    assert await call(*page, keys=KeyRing(None), insecure=True, cors_origins=["*"]) == ""
    assert (await refusal(*page, cors_origins=["*"])).status == 401
    with_basic = [*page, ("authorization", basic("", KEY))]
    assert (await refusal(*with_basic, cors_origins=["*"])).status == 403
    assert await call(*with_basic, cors_origins=["*", EVIL]) == "ada"
    assert await call(*with_basic, keys=KeyRing(None), insecure=True, cors_origins=["*"]) == ""


async def test_a_page_that_may_not_call_does_not_make_the_browser_ask_for_a_key() -> None:
    problem = await refusal(OWN, ("origin", EVIL))
    assert problem.status == 403
    assert "WWW-Authenticate" not in problem.headers
    assert repr(EVIL) in problem.message


async def test_who_is_refused_has_no_name() -> None:
    scope: dict[str, Any] = {"type": "http", "method": "GET", "path": PATH, "headers": []}
    with pytest.raises(Refusal):
        await Access(None, KeyRing(None, KEYS), (), (), False)(scope, None, None)  # type: ignore[arg-type]
    assert scope["state"]["key"] == ""
