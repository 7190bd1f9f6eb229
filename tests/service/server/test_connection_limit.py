"""Which connection is closed when there are too many."""

import resource
from collections import Counter
from random import Random

import pytest

from service.server.connection_limit import ConnectionLimit, WaitingConnections


class Connection:
    def __init__(self, network: str = "") -> None:
        self.network = network
        self.is_evicted = False

    def evict(self) -> None:
        self.is_evicted = True


def connected(limit: ConnectionLimit, number: int, address: str) -> list[Connection]:
    connections = [Connection() for _ in range(number)]
    for connection in connections:
        limit.add(connection, address)
    return connections


def evicted(connections: list[Connection]) -> list[bool]:
    return [connection.is_evicted for connection in connections]


def test_the_address_with_most_connections_loses_the_one_that_waited_longest() -> None:
    limit = ConnectionLimit(6)
    few, many = connected(limit, 2, "10.0.0.1"), connected(limit, 4, "10.0.0.2")
    new = connected(limit, 2, "10.0.0.3")
    assert evicted(few) == [False, False]
    assert evicted(many) == [True, True, False, False]
    assert evicted(new) == [False, False]
    assert limit.num_open == 6


def test_the_addresses_of_one_ipv6_network_are_one_client() -> None:
    limit = ConnectionLimit(4)
    alone = connected(limit, 1, "2001:db8:2::1")
    attacker = [connected(limit, 1, f"2001:db8:1::{number}")[0] for number in range(20)]
    assert evicted(alone) == [False]
    assert sum(evicted(attacker)) == 17


def test_a_connection_whose_request_is_computed_is_never_closed() -> None:
    limit = ConnectionLimit(3)
    working = connected(limit, 3, "10.0.0.1")
    for connection in working:
        limit.work(connection)
    (refused,) = connected(limit, 1, "10.0.0.2")
    assert evicted(working) == [False] * 3
    assert refused.is_evicted
    limit.wait(working[1])
    (served,) = connected(limit, 1, "10.0.0.2")
    assert evicted(working) == [False, True, False]
    assert not served.is_evicted


def test_waiting_anew_counts_from_then_on() -> None:
    limit = ConnectionLimit(3)
    first, second, third = connected(limit, 3, "10.0.0.1")
    limit.work(first)
    limit.wait(first)
    limit.wait(second)
    connected(limit, 1, "10.0.0.1")
    assert evicted([first, second, third]) == [False, False, True]


def test_closed_connections_make_room() -> None:
    limit = ConnectionLimit(2)
    first, second = connected(limit, 2, "10.0.0.1")
    limit.remove(first)
    limit.remove(first)
    connected(limit, 1, "10.0.0.1")
    assert evicted([first, second]) == [False, False]


def test_large_unfinished_heads_are_limited_on_their_own() -> None:
    limit = ConnectionLimit(100, max_large_heads=2)
    large, (small,) = connected(limit, 4, "10.0.0.1"), connected(limit, 1, "10.0.0.1")
    limit.hold_large_head(large[0])
    limit.hold_large_head(large[1])
    limit.release_head(large[0])
    limit.hold_large_head(large[2])
    assert evicted([*large, small]) == [False] * 5
    limit.hold_large_head(large[3])
    assert evicted([*large, small]) == [False, True, False, False, False]


def test_the_limit_stays_below_that_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    assert ConnectionLimit(4096).max_connections == 768
    assert ConnectionLimit(100).max_connections == 100


def test_a_flood_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    connected(ConnectionLimit(10), 1000, "10.0.0.1")
    (entry,) = caplog.records
    assert "SERVE_MAX_CONNECTIONS" in entry.getMessage()


def test_any_order_of_events_keeps_the_books() -> None:
    """Against a plain count: after each event, the network of the next victim is one of those with most."""
    chance = Random(7)
    waiting = WaitingConnections()
    known: list[Connection] = []
    for _ in range(3000):
        event = chance.random()
        if event < 0.5 or not known:
            connection = Connection(f"10.0.0.{chance.randrange(5)}")
            known.append(connection)
            waiting.add(connection.network, connection)
        elif event < 0.7:
            connection = chance.choice(known)
            waiting.add(connection.network, connection)
        elif event < 0.9:
            connection = known.pop(chance.randrange(len(known)))
            waiting.discard(connection.network, connection)
            waiting.discard(connection.network, connection)
        else:
            most = Counter(connection.network for connection in known).most_common()
            victim = waiting.pop()
            assert isinstance(victim, Connection)
            assert victim.network in [network for network, number in most if number == most[0][1]]
            known.remove(victim)
        assert len(waiting) == len(known)
    while known:
        victim = waiting.pop()
        assert isinstance(victim, Connection)
        known.remove(victim)
    assert waiting.pop() is None
