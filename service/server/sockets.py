"""Sockets of the service: how many there may be, what is set on them, and what the system knows of a connection."""

import socket
import struct
import sys
from asyncio import Transport

if sys.platform != "win32":
    import fcntl
    import resource
    import termios

MAX_CONNECTIONS = 65_536

KEEP_ALIVE_IDLE_S, KEEP_ALIVE_INTERVAL_S, KEEP_ALIVE_PROBES = 60, 15, 4

ACKED, ACKED_AT, TCP_INFO_SIZE = struct.Struct("=Q"), 120, 128
"""`tcpi_bytes_acked` of Linux's `struct tcp_info` (include/uapi/linux/tcp.h, since 4.1)."""


def keep_alive(listener: socket.socket) -> None:
    """Find out when a peer's machine has died, though nothing is sent to it. Accepted sockets inherit this on Linux.

    What is sent to a dead machine, `Connection` looks after: with `TCP_USER_TIMEOUT` Linux also resets readers who read
    steadily, but so slowly that their window stays small.
    """
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEP_ALIVE_IDLE_S),
        ("TCP_KEEPINTVL", KEEP_ALIVE_INTERVAL_S),
        ("TCP_KEEPCNT", KEEP_ALIVE_PROBES),
    ):
        if hasattr(socket, name):
            listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def allow_many() -> None:
    """Raise the limit of open files of this process, of which each connection is one, as far as it may itself."""
    if sys.platform != "win32":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, MAX_CONNECTIONS)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def num_unacknowledged(transport: Transport) -> int:
    """Bytes that the system has taken over, and the peer not: its own send buffer may hold megabytes."""
    if sys.platform == "win32":
        return 0
    try:
        answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        return 0
    return int.from_bytes(answer, sys.byteorder)


def num_acknowledged(transport: Transport) -> int | None:
    """Bytes that the peer's system has acknowledged since the connection began; None where this is not known."""
    if sys.platform != "linux":
        return None
    try:
        found = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_SIZE)
    except (OSError, ValueError):
        return None
    return ACKED.unpack_from(found, ACKED_AT)[0] if len(found) == TCP_INFO_SIZE else None
