"""Who may call: the API key, the host that a browser believes it talks to, the origin of the page that calls.

It also limits how often pages are read and how often wrong keys are tried. Knows nothing of what is called, but that
`/health` and `/ready` are for everybody.
"""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from llm.errors import shown
from service.address import network_of
from service.entry.keys import KeyRing
from service.entry.quota import BoundedRate, parse_rate
from service.errors import Refusal

FOR_EVERYBODY = ("/health", "/ready")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
DEFAULT_PORTS = {"http": "80", "https": "443"}

CHALLENGE = 'Basic realm="llama3-langserve", charset="UTF-8", Bearer realm="llama3-langserve"'
"""Basic first, and a parameter to each: otherwise Chromium asks for no password."""

WAYS = "`X-API-Key: KEY`, `Authorization: Bearer KEY`, or HTTP Basic with KEY as the password and any user name"

POLICY_VIOLATION = 1008

WHITE_SPACE = " \t"
"""What HTTP allows around a header's value, and files and shells leave behind a key."""

SCHEME = re.compile(r"([^ \t]*+)[ \t]*+(.*+)", re.DOTALL)
"""An authentication scheme and its credentials. Matches every text."""

AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/?#@\s]+))(?::([0-9]*))?")


class Access:
    """Lets a request through, or raises a `Refusal`. Whose key it came with is in `scope["state"]["key"]`, or "".

    Args:
        app: What is called.
        keys: Who may call; everybody, if it is open.
        allowed_hosts: Names that the service has, besides those of loopback: `name`, `*.name`, or `*` for any. They
            are checked where no key protects it: there, a page could have its own name point here (DNS rebinding), and
            be of the same origin. With keys, or if `insecure`, only if there are any.
        cors_origins: Origins like `https://example.com` whose pages may call. `*` is for pages that give the key
            themselves: one that the browser adds (Basic) is not theirs to use.
        insecure: Whoever reaches the service may use it, by whatever name.
        page_rate_limit: How many requests other than POST a key may send; where there is no key, an address (for IPv6,
            a network of 64 bits). `/health` and `/ready` are not counted: probes must always get through.
        login_rate_limit: How many requests with an invalid key an address may send before it gets 429 in place of 401.
            A valid key is still served: otherwise one client could lock out others behind the same address.

    Raises:
        ValueError: One of `allowed_hosts` can be no host, or a rate limit is invalid.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        allowed_hosts: Sequence[str],
        cors_origins: Sequence[str],
        insecure: bool,
        page_rate_limit: str = "",
        login_rate_limit: str = "",
    ) -> None:
        self.app = app
        self._keys = keys
        self._hosts = tuple(host_pattern(host) for host in allowed_hosts)
        self._origins = frozenset(cors_origins)
        self._checks_host = bool(allowed_hosts) or (keys.is_open and not insecure)
        self._page_rate_limit, self._login_rate_limit = page_rate_limit, login_rate_limit
        self._pages = BoundedRate(parse_rate(page_rate_limit))
        self._logins = BoundedRate(parse_rate(login_rate_limit))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return
        if scope["type"] == "http":
            state = scope.setdefault("state", {})
            state["key"] = ""
            # As it is routed; what would have to be made simpler first (`/health/`, `//health`) needs a key.
            if scope["path"].removeprefix(scope.get("root_path", "")) not in FOR_EVERYBODY:
                client = scope.get("client")
                state["key"] = self._admit(scope["method"], Headers(scope=scope), client[0] if client else "")
        await self.app(scope, receive, send)

    def _admit(self, method: str, headers: Headers, address: str) -> str:
        """Whose request it is."""
        given = None if self._keys.is_open else given_key(headers)
        if self._checks_host:
            self._check_host(headers.getlist("host"))
        if method not in SAFE_METHODS:
            self._check_origin(headers, given)
        if self._keys.is_open:
            if method != "POST":
                self._count_page("address", network_of(address))
            return ""
        name = self._keys.name_of(given.text) if given and given.text else None
        if name is None:
            if given:
                self._count_login(network_of(address))
            else:
                self._count_page("address", network_of(address))
            trouble = "the one of this request is not valid" if given else "this request has none"
            raise Refusal(
                401,
                "unauthorized",
                f"an API key is needed, and {trouble}: send it as {WAYS}",
                headers={"WWW-Authenticate": CHALLENGE},
            )
        if method != "POST":  # calls are counted by SERVE_RATE_LIMIT
            self._count_page("key", name)
        return name

    def _count_page(self, kind: str, caller: str) -> None:
        if (wait_s := self._pages.hit(f"{kind} {caller}")) is not None:
            raise _rate_limited(
                f"this {kind} has sent too many requests for pages: the limit is {self._page_rate_limit} "
                "(SERVE_PAGE_RATE_LIMIT)",
                wait_s,
            )

    def _count_login(self, network: str) -> None:
        if (wait_s := self._logins.hit(network)) is not None:
            raise _rate_limited(
                f"this address has sent too many invalid API keys, and this one is invalid too: the limit is "
                f"{self._login_rate_limit} (SERVE_LOGIN_RATE_LIMIT)",
                wait_s,
            )

    def _check_host(self, hosts: Sequence[str]) -> None:
        # Every browser sends a Host; without one, this is a program, which goes where it wants and not where a page
        # has led it: an old client, or a load balancer that probes with HTTP/1.0.
        if not hosts:
            return
        host = Authority.parse(hosts[0]) if len(hosts) == 1 else None
        if host is None or not (is_loopback(host.name) or any(is_named(host.name, known) for known in self._hosts)):
            raise Refusal(
                421, "misdirected", f"the service has no name {shown(', '.join(hosts))}; SERVE_ALLOWED_HOSTS can add it"
            )

    def _check_origin(self, headers: Headers, given: "GivenKey | None") -> None:
        """Refuse what a page of another origin sends without being allowed to (cross-site request forgery).

        The algorithm is that of Go's `http.CrossOriginProtection`: https://words.filippo.io/csrf/
        """
        site, origin = headers.get("sec-fetch-site"), headers.get("origin")
        if site in ("same-origin", "none") or (not site and not origin):
            return
        if not site and origin and is_at(origin, headers.get("host", "")):  # an old browser, or HTTP without TLS
            return
        if origin in self._origins or ("*" in self._origins and not (given and given.is_by_browser)):
            return
        raise Refusal(
            403,
            "forbidden_origin",
            f"a page of the origin {shown(origin or 'unknown')} may not send this: SERVE_CORS_ORIGINS has to list it, "
            "or have * while the page itself sends the key, in X-API-Key or as Bearer. If it is a page of this "
            "service, a proxy between has changed the Host header: it has to pass that on as it was",
        )


def _rate_limited(message: str, wait_s: int) -> Refusal:
    return Refusal(429, "rate_limited", message, headers={"Retry-After": str(wait_s)})


@dataclass(frozen=True, slots=True)
class GivenKey:
    """A key as a request gives it; empty if it cannot be read. `is_by_browser`: those add it to any page's requests."""

    text: str
    is_by_browser: bool = False


def given_key(headers: Headers) -> GivenKey | None:
    """The key that a request gives, by the first of the ways that it uses."""
    own, authorizations = headers.getlist("x-api-key"), headers.getlist("authorization")
    if own:
        return GivenKey(own[0].strip(WHITE_SPACE) if len(own) == 1 else "")
    if not authorizations:
        return None
    scheme, credentials = SCHEME.fullmatch(authorizations[0].strip(WHITE_SPACE)).groups()  # type: ignore[union-attr]
    is_basic = scheme.lower() == "basic"
    if len(authorizations) > 1 or not (is_basic or scheme.lower() == "bearer"):
        return GivenKey("", is_basic)
    return GivenKey(password(credentials) if is_basic else credentials, is_basic)


def password(credentials: str) -> str:
    """The password of HTTP Basic's credentials, or the user name if that is empty, as with `curl -u KEY:`."""
    try:
        user, _, password = base64.b64decode(credentials, validate=True).decode().partition(":")
    except ValueError:
        return ""
    return password or user


@dataclass(frozen=True, slots=True)
class Authority:
    """What a Host header says, in one spelling."""

    name: str
    port: str

    @classmethod
    def parse(cls, text: str, default_port: str = "") -> "Authority | None":
        """Read one; None if it is none."""
        match = AUTHORITY.fullmatch(text)
        if not match:
            return None
        address, name, port = match.groups()
        if address:
            try:
                name = str(IPv6Address(address))
            except ValueError:
                return None
        return cls(name.lower().removesuffix("."), port or default_port)


def is_at(origin: str, host: str) -> bool:
    """Whether an origin is that of a host. The scheme by which the host was reached is not known."""
    scheme, _, authority = origin.partition("://")
    port = DEFAULT_PORTS.get(scheme, "")
    here = Authority.parse(host, port)
    return here is not None and here == Authority.parse(authority, port)


def is_loopback(name: str) -> bool:
    """Whether a name leads to this machine wherever it is looked up (RFC 6761), so that no page can have taken it."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def host_pattern(host: str) -> str:
    """One of SERVE_ALLOWED_HOSTS as `is_named` takes it; a port is of no account. Raises ValueError if it is none."""
    wildcard = host[: 2 if host.startswith("*.") else 0]
    parsed = Authority.parse(host.removeprefix(wildcard)) or Authority.parse(f"[{host}]")
    if host == "*":
        return host
    if parsed is None or "*" in parsed.name:
        raise ValueError(f"{shown(host)} is no host: example.com, *.example.com, an address, or *")
    return wildcard + parsed.name


def is_named(name: str, pattern: str) -> bool:
    """Whether a host's name is one of a pattern."""
    return pattern in ("*", name) or (pattern.startswith("*.") and name.endswith(pattern[1:]))
