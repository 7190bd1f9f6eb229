import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm import hubs
from llm.network import HTTPX
from tests.llm.stand_in_hub import ROOT, StandIn, environment, hugging_face_hub
from tests.llm.tiny_checkpoint import build_tiny_checkpoint, contents


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandIn]:
    with hugging_face_hub() as hub:
        hub.repos["org/tiny"] = {"main": contents(build_tiny_checkpoint(tmp_path / "tiny"))}
        yield hub


def download(home: Path, hub: StandIn, *references: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llm.download", *references],
        env=environment(home, hub.variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_it_prints_the_directory_and_shows_progress(hub: StandIn, tmp_path: Path) -> None:
    done = download(tmp_path, hub, "hf:org/tiny")
    assert done.returncode == 0, done.stderr
    assert (Path(done.stdout.strip()) / "config.json").is_file()
    assert "%" in done.stderr


def test_it_asks_the_hub_again_and_fetches_only_what_is_new(hub: StandIn, tmp_path: Path) -> None:
    download(tmp_path, hub, "hf:org/tiny")
    hub.asked.clear()
    assert download(tmp_path, hub, "hf:org/tiny").returncode == 0
    assert hub.asked
    assert hub.files_sent() == {}


def test_a_failure_is_one_line_and_the_others_are_fetched(hub: StandIn, tmp_path: Path) -> None:
    done = download(tmp_path, hub, "meta-llama/Meta-Llama-3-8B", "hf:org/tiny")
    assert done.returncode == 1
    assert done.stderr.startswith("error: 'meta-llama/Meta-Llama-3-8B' is no existing path")
    assert "Traceback" not in done.stderr
    assert (Path(done.stdout.strip()) / "config.json").is_file()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"https_proxy": "proxy.example.com:port"}, "https_proxy is 'proxy.example.com:…', which is not the URL of"),
        ({"HTTP_PROXY": "http://127.0.0.1:9"}, "check the proxy in HTTP_PROXY"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_unusable_proxy_is_one_line_that_names_its_variable(
    tmp_path: Path, variables: dict[str, str], expected: str
) -> None:
    """The client's own complaint was a traceback: an ImportError, or an InvalidURL of a URL that nobody typed."""
    hub = StandIn(variables={"HF_ENDPOINT": "http://hub.invalid", **variables})

    done = download(tmp_path, hub, "hf:org/tiny")

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: hf:org/tiny is not whole in ")
    assert expected in line


@pytest.mark.parametrize("error", [ImportError("no module"), ValueError("Unknown scheme for proxy URL")])
def test_where_the_client_cannot_be_made_the_proxy_variables_are_named(error: Exception) -> None:
    """Nothing can be seen in the environment, but no connection was tried, either."""
    failed = hubs._unreachable("hf:org/tiny", "/cache", "https://hub.example.com", "HF_ENDPOINT", HTTPX, error)

    assert f"({error}): check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY" in str(failed)


def test_help_says_what_a_reference_is(hub: StandIn, tmp_path: Path) -> None:
    done = download(tmp_path, hub, "--help")
    assert done.returncode == 0
    assert "hf:org/name[@revision]" in done.stdout
    assert "HF_TOKEN" in done.stdout
