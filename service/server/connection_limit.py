"""The limit on open connections: which one is closed when there are too many. Knows no HTTP."""

import logging
import sys
import time
from collections import OrderedDict
from typing import Protocol

from service.address import network_of

if sys.platform != "win32":
    import resource

log = logging.getLogger(__name__)

MAX_LARGE_HEADS = 256
"""Unfinished request heads of more than a few kilobytes that are held at once. Real clients send a head in one go, so
nearly none of theirs is ever held half-sent."""

RESERVED_FILES = 256
"""File descriptors kept for everything but connections: without any left, not even `/health` could be accepted."""

LOG_INTERVAL_S = 10.0


class Evictable(Protocol):
    """A connection as this module sees it."""

    def evict(self) -> None:
        """Close at once, and free the memory."""
        ...


class WaitingConnections:
    """Connections that wait for their clients, by network and by how long. Every operation takes constant time."""

    def __init__(self) -> None:
        self._waiting: dict[str, OrderedDict[Evictable, None]] = {}
        self._networks: dict[int, OrderedDict[str, None]] = {}  # by the number of connections they have here
        self._largest = 0

    def __len__(self) -> int:
        return sum(number * len(networks) for number, networks in self._networks.items())

    def add(self, network: str, connection: Evictable) -> None:
        """Add a connection as the one that began to wait last."""
        connections = self._waiting.setdefault(network, OrderedDict())
        if connection in connections:
            connections.move_to_end(connection)
            return
        connections[connection] = None
        self._move(network, len(connections) - 1, len(connections))

    def discard(self, network: str, connection: Evictable) -> None:
        """Remove a connection, if it is here."""
        connections = self._waiting.get(network)
        if connections is None or connection not in connections:
            return
        del connections[connection]
        self._move(network, len(connections) + 1, len(connections))
        if not connections:
            del self._waiting[network]

    def pop(self) -> Evictable | None:
        """Remove and return the longest-waiting connection of the network that has most, or None if none waits."""
        if not self._largest:
            return None
        network = next(iter(self._networks[self._largest]))
        connection = next(iter(self._waiting[network]))
        self.discard(network, connection)
        return connection

    def _move(self, network: str, before: int, now: int) -> None:
        if before:
            del self._networks[before][network]
            if not self._networks[before]:
                del self._networks[before]
        if now:
            self._networks.setdefault(now, OrderedDict())[network] = None
        if now > self._largest:
            self._largest = now
        elif before == self._largest and before not in self._networks:
            self._largest = now  # a network's number changes by one at a time, so this is the next largest


class ConnectionLimit:
    """Keeps the number of connections, and of large unfinished request heads, within bounds.

    A connection is closed to make room for a new one, so that new clients, such as a health probe, are answered. It is
    one that waits for its client: between requests, within a request that was not sent whole, or for an answer to be
    read. The network (one IPv4 address, or 64 bits of an IPv6 address) with most such connections loses the one that
    waited longest, so that one client cannot push out others. A connection whose request is being computed is never
    closed; if there are no others, the new connection is.
    """

    def __init__(self, max_connections: int, max_large_heads: int = MAX_LARGE_HEADS) -> None:
        self.max_connections = min(max_connections, _max_files())
        self._max_large_heads = max_large_heads
        self._open: dict[Evictable, str] = {}
        self._waiting = WaitingConnections()
        self._large_heads = WaitingConnections()
        self._num_evicted = 0
        self._logged_at = -LOG_INTERVAL_S

    @property
    def num_open(self) -> int:
        """Open connections."""
        return len(self._open)

    def add(self, connection: Evictable, address: str) -> None:
        """Add a new connection; if there are too many, close one."""
        self._open[connection] = network = network_of(address)
        self._waiting.add(network, connection)
        while self.num_open > self.max_connections and (victim := self._waiting.pop()):
            self._evict(victim, f"more than {self.max_connections} connections (SERVE_MAX_CONNECTIONS) were open")

    def remove(self, connection: Evictable) -> None:
        """Forget a connection that is closed."""
        if (network := self._open.pop(connection, None)) is not None:
            self._waiting.discard(network, connection)
            self._large_heads.discard(network, connection)

    def wait(self, connection: Evictable) -> None:
        """Note that a connection waits for its client from now on."""
        if (network := self._open.get(connection)) is not None:
            self._waiting.add(network, connection)

    def work(self, connection: Evictable) -> None:
        """Note that a connection waits for the service, and not for its client."""
        if (network := self._open.get(connection)) is not None:
            self._waiting.discard(network, connection)

    def hold_large_head(self, connection: Evictable) -> None:
        """Note that a connection holds a large unfinished head; if there are too many, close one."""
        if (network := self._open.get(connection)) is not None:
            self._large_heads.add(network, connection)
            while len(self._large_heads) > self._max_large_heads and (victim := self._large_heads.pop()):
                self._evict(victim, f"more than {self._max_large_heads} large request heads were unfinished")

    def release_head(self, connection: Evictable) -> None:
        """Note that a connection's head is finished, or dropped."""
        if (network := self._open.get(connection)) is not None:
            self._large_heads.discard(network, connection)

    def _evict(self, connection: Evictable, reason: str) -> None:
        self.remove(connection)
        connection.evict()
        self._num_evicted += 1
        now = time.monotonic()
        if now - self._logged_at >= LOG_INTERVAL_S:  # one line for each would be a flood itself
            log.warning("Closed %d connections that waited for their clients: %s", self._num_evicted, reason)
            self._num_evicted, self._logged_at = 0, now


def _max_files() -> int:
    """How many connections this process may have by its limit of open files."""
    if sys.platform == "win32":
        return sys.maxsize
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(soft // 2, soft - RESERVED_FILES)
