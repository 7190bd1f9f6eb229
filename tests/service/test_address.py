"""What is taken for a client's address, and what never is."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

from service.address import PEER, ClientAddress, network_of, parse_address


@pytest.mark.parametrize(
    ("text", "address", "network"),
    [
        ("192.0.2.7", "192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7", "192.0.2.7"),
        ("2001:DB8:0:0::7", "2001:db8::7", "2001:db8::/64"),
        ("2001:db8:0:0:7:0:0:1", "2001:db8::7:0:0:1", "2001:db8::/64"),
        ("64:ff9b::192.0.2.7", "64:ff9b::c000:207", "192.0.2.7"),  # NAT64: all clients have one network
        ("2002:c000:207:5::9", "2002:c000:207:5::9", "192.0.2.7"),  # 6to4: one client has many
        ("fe80::1%eth0", "fe80::1", "fe80::/64"),
        ("fe80::1%e\nforged line", "fe80::1", "fe80::/64"),
        ("fe80::1%" + "x" * 60_000, "fe80::1", "fe80::/64"),
        ("192.0.2.7\n", "", ""),
        ("192.0.2.07", "", ""),
        ("example.com", "", ""),
        ("unknown", "", ""),
        ("", "", ""),
        ("1" * 60_000, "", ""),
    ],
)
def test_an_address_has_one_spelling_and_text_is_none(text: str, address: str, network: str) -> None:
    assert parse_address(text) == address
    assert network_of(text) == network


@settings(max_examples=50)
@given(st.text(max_size=100))
def test_no_text_passes_for_an_address(text: str) -> None:
    assert set(parse_address(text)) <= set("0123456789abcdef.:")
    assert len(parse_address(f"::1%{text}")) < 46


async def client_of(peer: Any, *forwarded: str, trusted: str = "127.0.0.1") -> Any:
    """What the application behind uvicorn's layer and ours sees."""
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"])

    headers = [(b"x-forwarded-for", value.encode("latin-1")) for value in forwarded]
    scope: Any = {"type": "http", "client": peer, "headers": headers, "state": {PEER: peer}}
    await ProxyHeadersMiddleware(ClientAddress(app), trusted)(scope, None, None)  # type: ignore[arg-type]
    return seen[0]


async def test_a_trusted_proxy_says_who_the_client_is() -> None:
    proxy = ("127.0.0.1", 4000)
    assert (await client_of(proxy, "203.0.113.9"))[0] == "203.0.113.9"
    assert await client_of(proxy, "198.51.100.1, 203.0.113.9:1234") == ("203.0.113.9", 1234)
    assert (await client_of(proxy, "[2001:db8::9]:1234"))[0] == "2001:db8::9"
    assert await client_of(("192.0.2.1", 5), "203.0.113.9") == ("192.0.2.1", 5)


@pytest.mark.parametrize(
    "forwarded",
    ["nobody", "<script>", "a b\tc", "1.2.3.4 GET /forged 200", "x" * 60_000, "ü", "1.2.3.4.5", "[::1", "%s%n"],
)
@pytest.mark.parametrize("trusted", ["127.0.0.1", "*"])
async def test_the_peer_stands_for_what_is_no_address(forwarded: str, trusted: str) -> None:
    assert await client_of(("127.0.0.1", 4000), forwarded, trusted=trusted) == ("127.0.0.1", 4000)


async def test_a_port_beyond_all_ports_is_none() -> None:
    assert await client_of(("127.0.0.1", 4000), "203.0.113.9:" + "9" * 400) == ("203.0.113.9", 0)


async def test_a_unix_socket_has_no_address() -> None:
    assert await client_of(None) is None
    assert await client_of(("", 0), "nobody", trusted="*") is None
