"""On what, with what and by which command something was measured: what a reader needs to judge it. No names of hosts or
people, and no paths."""

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tests.server import ROOT

_PACKAGES = ("torch", "transformers", "langserve", "langchain-core", "fastapi", "uvicorn", "httpx")


def described() -> dict[str, object]:
    """Hardware, versions, date, command, commit."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": gpu(),
        "python": platform.python_version(),
        "versions": {package: found for package in _PACKAGES if (found := _version(package))},
        "command": command(sys.argv[1:]),
        "commit": commit(),
    }


def cpu() -> str:
    """The processor's name, and those of its features that decide how fast a model runs on it."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        key, _, value = (part.strip() for part in line.partition(":"))
        if key == "model name":
            name = value
        elif key == "flags":
            flags = set(value.split())
    features = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({', '.join(features)})" if features else name


def gpu() -> str | None:
    """The first GPU's name and memory; None where there is none."""
    nvidia_smi = shutil.which("nvidia-smi")
    if nvidia_smi is None:
        return None
    query = [nvidia_smi, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0] if lines else None


def commit() -> str | None:
    """The checkout's commit, with a + if it has changes; None where git cannot say."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "") if head else None
    except OSError:
        return None


def command(arguments: Sequence[str]) -> str:
    """The command line, with the last part of each path."""
    shown = [Path(argument).name if os.sep in argument else argument for argument in arguments]
    return shlex.join(["python", "-m", "tests.bench", *shown])


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
