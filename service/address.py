"""Addresses of clients: checked before anything is logged, counted or limited by them."""

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from starlette.types import ASGIApp, Receive, Scope, Send

IPV6_PREFIX = 64
"""Bits of an IPv6 address that say whose it is: the rest its owner chooses freely."""

NAT64 = IPv6Network("64:ff9b::/96")
"""RFC 6052, section 2.1."""

MAX_ADDRESS = 64
"""Characters that are looked at. No address has as many."""

PEER = "peer"
"""Where in a scope's state the connection's own address is: uvicorn replaces `client` by what a proxy says."""


def parse_address(text: str) -> str:
    """An IP address in its one spelling, without a zone. Empty if the text is something else."""
    try:
        address = ip_address(text[:MAX_ADDRESS])
    except ValueError:
        return ""
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(IPv6Address(int(address)))  # a zone (`%eth0`) may be any text
    return str(address)


def network_of(address: str) -> str:
    """The network that identifies a client without a key. Empty if there is no address."""
    parsed = parse_address(address)
    if ":" not in parsed:
        return parsed
    of_ipv4 = _translated(IPv6Address(parsed))
    return str(of_ipv4 or ip_network(f"{parsed}/{IPV6_PREFIX}", strict=False))


def _translated(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a 6to4 or NAT64 address stands for: of the one a client has many networks, of the other all
    clients have one.
    """
    if address in NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.sixtofour


class ClientAddress:
    """Puts an IP address, or nothing, into `scope["client"]`.

    Uvicorn copies what a trusted proxy's `X-Forwarded-For` says, whatever it is, and a proxy may pass on what its
    client wrote there. In place of text that is no address, the address of the connection's peer is used.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host, port = scope.get("client") or ("", 0)
            address = parse_address(host)
            if not address:
                host, port = scope.get("state", {}).get(PEER) or ("", 0)
                address = parse_address(host)
            scope["client"] = (address, port if 0 <= port <= 65535 else 0) if address else None
        await self.app(scope, receive, send)
