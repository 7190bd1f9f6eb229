"""The floors: serve.py above service/ above chains/; llm/ stands apart and is handed in."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("serve", "service", "chains", "llm")
SEEN_BY_SERVICE = {
    "llm.errors",
    "llm.caller",
    "llm.flow",
    "llm.engine.Engine",
    "llm.engine.EngineHealth",
    "llm.engine.EngineState",
}
"""Of `llm`, the service knows the error types, the health value, the request context, and back pressure."""


def imports(package: str) -> Iterator[tuple[Path, str]]:
    """Every module or name of ours that a package imports, wherever in its code."""
    files = [ROOT / "serve.py"] if package == "serve" else sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} imports relatively"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((file, name) for name in names if name.split(".")[0] in (*FLOORS, "tests"))


@pytest.mark.parametrize(
    ("package", "below"),
    [
        ("serve", {"service", "chains", "llm"}),
        ("service", {"service", "chains", "llm"}),
        ("chains", {"chains"}),
        ("llm", {"llm"}),
    ],
)
def test_a_package_imports_only_what_is_below_it(package: str, below: set[str]) -> None:
    for file, name in imports(package):
        assert name.split(".")[0] in below, f"{file} imports {name}"


def test_the_service_knows_of_the_model_only_its_errors_its_health_its_caller_and_its_flow() -> None:
    for file, name in imports("service"):
        if name.startswith("llm."):
            assert name in SEEN_BY_SERVICE or name.rpartition(".")[0] in SEEN_BY_SERVICE, f"{file} imports {name}"


@pytest.mark.parametrize("module", ["serve", "service.app", "chains", "llm", "llm.errors", "llm.engine"])
def test_importing_the_application_does_not_import_torch(module: str) -> None:
    script = f"import sys, {module}; print({{'torch', 'transformers'}} & set(sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (result.stdout, result.stderr) == ("set()\n", "")
