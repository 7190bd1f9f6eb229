"""What one request to a chain may ask for. A chat and a book differ, so each limit can be set per chain."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

N = TypeVar("N", int, float)


def parse_per_chain(kind: type[N], value: str) -> tuple[N, Mapping[str, N]]:
    """Read `600,chat=300`: what holds for all, and for single chains. Raises ValueError."""
    general: list[N] = []
    chains: dict[str, N] = {}
    for part in value.split(","):
        name, is_named, number = part.strip().rpartition("=")
        try:
            limit = kind(number)
        except ValueError:
            raise ValueError(
                f"one number for all chains, and more like chat=300 after commas; {part!r} is none"
            ) from None
        if not 0 < limit < math.inf:
            raise ValueError(f"a limit is more than 0 and finite; {part!r} is not")
        if name.strip() in chains:
            raise ValueError(f"one number for a chain; {name.strip()} has two")
        if is_named:
            chains[name.strip()] = limit
        else:
            general.append(limit)
    if len(general) != 1:
        raise ValueError(f"one number for all chains, got {len(general)}")
    return general[0], chains


def limit_of(kind: type[N], value: str, chain: str) -> N:
    """What holds for one chain."""
    general, chains = parse_per_chain(kind, value)
    return chains.get(chain, general)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one chain."""

    max_body: int
    """Bytes."""
    max_batch: int
    max_input_tokens: int
    """Of all inputs of a request together."""
    max_output_tokens: int
    """Of each answer."""
    timeout_s: float
    max_file: int
    """Bytes of a file."""
    max_pages: int
    """Of a file."""
