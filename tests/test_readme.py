"""What the README says is run: its code, its commands, its table of settings."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.settings import Settings
from tests.nginx import LOCATION
from tests.server import ROOT, Server

README = (ROOT / "README.md").read_text()
SETTINGS = re.compile(r"(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=range(len(blocks("python"))))
def test_the_python_code_runs(server: Server, code: str) -> None:
    code = code.replace("http://127.0.0.1:8000", server.url)

    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)

    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("command", re.findall(r"^curl .*?[^\\]$", README, re.DOTALL | re.MULTILINE))
def test_the_curl_lines_run(server: Server, command: str) -> None:
    command = command.replace("http://127.0.0.1:8000", server.url)

    run = subprocess.run(["bash", "-c", f"{command} --fail-with-body -s"], capture_output=True, text=True, timeout=60)

    assert run.returncode == 0, run.stdout
    assert "error" not in run.stdout


@pytest.mark.parametrize("code", blocks("js"))
def test_the_javascript_code_runs(server: Server, code: str) -> None:
    directory = ROOT / "tests/wire/javascript"
    node = shutil.which("node")
    if node is None or not (directory / "node_modules").exists():
        pytest.skip("Node.js or LangChain.js is not installed")
    code = code.replace("http://127.0.0.1:8000", server.url)

    run = subprocess.run(
        [node, "--input-type=module", "-"], input=code, cwd=directory, capture_output=True, text=True, timeout=100
    )

    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout


def test_the_table_of_settings_is_that_of_the_code() -> None:
    """To write it anew: `python -m tests.test_readme`."""
    found = SETTINGS.search(README)
    assert found is not None
    assert found.group() == settings_table()


def settings_table() -> str:
    rows = ["| environment | flag | default | |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        default = "" if field.default in (None, "", (), SecretStr("")) else f"`{field.default}`"
        rows.append(f"| `SERVE_{name.upper()}` | `{flag}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


def test_the_proxy_is_told_what_the_tests_tell_theirs() -> None:
    assert blocks("nginx") == [LOCATION]


def test_what_the_readme_links_to_is_there() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    Path(ROOT / "README.md").write_text(SETTINGS.sub(settings_table(), README))
