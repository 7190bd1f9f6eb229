"""Says which environment variable keeps an HTTP client from a server: a proxy, a certificate file, an endpoint.

Clients read these variables themselves, and fail in ways that do not name them: an ImportError, a URL that nobody
typed, a file that is missing. Knows no client but for the package that it needs for SOCKS.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from urllib.parse import SplitResult, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined]  # since Python 2.6

_SCHEMES = ("https", "http", "all")


@dataclass(frozen=True, slots=True)
class Client:
    """What an HTTP client makes of the environment."""

    socks_package: str
    """What to install for SOCKS proxies."""
    socks_module: str
    """The module that this package has."""
    proxy_schemes: frozenset[str]
    """Schemes of proxies, SOCKS included, that it can use."""
    certificates: tuple[str, ...]
    """Variables that name certificate files or directories, the first one first."""
    reads_all_proxies: bool
    """Whether it fails at any unusable proxy, even at one that is not for the server that it calls."""


HTTPX = Client(
    socks_package="socksio",
    socks_module="socksio",
    proxy_schemes=frozenset({"http", "https", "socks5", "socks5h"}),
    certificates=("SSL_CERT_FILE", "SSL_CERT_DIR"),
    reads_all_proxies=True,
)
REQUESTS = Client(
    socks_package="pysocks",
    socks_module="socks",
    proxy_schemes=frozenset({"http", "https", "socks4", "socks4a", "socks5", "socks5h"}),
    certificates=("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
    reads_all_proxies=False,
)


def find_trouble(
    client: Client, endpoint: str, endpoint_variable: str, environment: Mapping[str, str] = os.environ
) -> str | None:
    """What is wrong with the environment and what to do about it, in one sentence; None if nothing can be seen."""
    parts = _split(endpoint)
    if parts is None or parts.scheme not in ("http", "https"):
        return f"{endpoint_variable} is {endpoint!r}, which is not a URL like https://hub.example.com: correct it"
    used = proxy_variable(endpoint, environment)
    for variable, value in _proxies(environment):
        if (variable == used or client.reads_all_proxies) and (trouble := _proxy_trouble(client, value)):
            return f"{variable} {trouble}, or unset {variable}"
    for variable in client.certificates:
        path = environment.get(variable)
        if path and not os.path.exists(path):
            return f"{variable} names {path!r}, which does not exist: set it to a file of CA certificates, or unset it"
    return None


def proxy_variable(endpoint: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """The variable whose proxy is used for an endpoint, if any."""
    parts = _split(endpoint)
    if parts is None:
        return None
    if proxy_bypass_environment(parts.hostname or "", {"no": _no_proxy(environment)}):
        return None
    wanted = (f"{parts.scheme}_proxy", "all_proxy")
    found = {variable.lower(): variable for variable, _ in _proxies(environment)}
    return next((found[name] for name in wanted if name in found), None)


def _proxies(environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The variables that set a proxy. Of two spellings clients take the one in lower case."""
    if "*" in [host.strip() for host in _no_proxy(environment).split(",")]:
        return
    for scheme in _SCHEMES:
        for variable in (f"{scheme}_proxy", f"{scheme}_proxy".upper()):
            if value := environment.get(variable, "").strip():
                yield variable, value
                break


def _no_proxy(environment: Mapping[str, str]) -> str:
    return environment.get("no_proxy") or environment.get("NO_PROXY") or ""


def _proxy_trouble(client: Client, value: str) -> str | None:
    parts = _split(value if "://" in value else f"http://{value}")
    shown = repr(_without_password(value))
    if parts is None:
        return f"is {shown}, which is not the URL of a proxy: set it to one like http://proxy.example.com:3128"
    if parts.scheme not in client.proxy_schemes:
        supported = ", ".join(sorted(client.proxy_schemes))
        return f"is {shown}, a proxy of an unsupported scheme: use one of {supported}"
    if parts.scheme.startswith("socks") and find_spec(client.socks_module) is None:
        return f"is {shown}, and SOCKS proxies need one more package: pip install {client.socks_package}"
    return None


def _split(url: str) -> SplitResult | None:
    """The parts of a URL; None unless it has a host, and a valid port if any."""
    try:
        parts = urlsplit(url)
        return parts if parts.hostname and (parts.port is None or parts.port > 0) and not _has_space(url) else None
    except ValueError:
        return None


def _has_space(url: str) -> bool:
    return any(char.isspace() or not char.isprintable() for char in url)


def _without_password(url: str) -> str:
    """The URL with "…" in place of what may be a password, whether or not it can be parsed."""
    scheme, slashes, rest = url.rpartition("//")
    _, at, host = rest.rpartition("@")
    if at:
        return f"{scheme}{slashes}…@{host}"
    name, colon, port = rest.partition(":")
    may_have_password = colon and not rest.startswith("[") and not port.rstrip("/").isdecimal()
    return f"{scheme}{slashes}{name}:…" if may_have_password else url
