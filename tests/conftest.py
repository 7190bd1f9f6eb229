import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.redis_server import REDIS, RedisServer
from tests.server import Server
from tests.tiny_llama3 import build_tiny_llama3

# Two tests run at once: torch's threads that wait must not keep the other one from its core. Read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def tiny_llama3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: Llama 3's tokenizer and template, random weights."""
    return build_tiny_llama3(tmp_path_factory.mktemp("tiny-llama3"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with the embedded model, as `make serve` starts it."""
    with Server(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="session")
def scripted_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service with a scripted model: see `tests/scripted_server.py`."""
    with Server(tmp_path_factory.mktemp("scripted-server") / "log", script="tests/scripted_server.py") as server:
        yield server


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    if REDIS is None:
        pytest.skip("redis-server is not installed")
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()
