"""`make sanitize`: the CPU's kernel under AddressSanitizer and UndefinedBehaviorSanitizer, on random models.

Builds `tests/llm/llama/native/fuzz.c` with the kernel for this machine, for x86-64-v3 and for ARM (run by qemu), and
runs it; then runs the kernel's own tests over sanitized builds of it, so that torch's real buffers are watched as well.
Returns 1 on any finding or wrong number, and 2 if a tool is missing: nothing is skipped.
"""

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRIVER = ROOT / "tests/llm/llama/native/fuzz.c"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1", "-Wno-psabi")
NUM_THREADS = 4
"""At most, in the driver; on purpose more than small machines have cores."""
KERNEL_TESTS = "(step or prompt or row or memory or threads) and not without"
"""Of `test_kernel.py`, those that compute; the others are about compilers and caches."""
COMPILE = "import sys; from llm.llama import kernel; kernel.COMPILE_TIMEOUT_S = 3600; kernel._compiled(sys.argv[1])"
TEST = "import sys, pytest; from llm.llama import kernel; kernel.loaded(); sys.exit(pytest.main(sys.argv[1:]))"
"""Fails where the kernel cannot be loaded: the tests would be skipped."""


@dataclass(frozen=True)
class Build:
    """What the driver is compiled for, and how it is run."""

    name: str
    compiler: str
    flags: tuple[str, ...]
    run: tuple[str, ...] = ()
    num_models: int = 300


BUILDS = (
    Build("native", "gcc", ("-march=native",)),
    Build("x86-64-v3", "gcc", ("-march=x86-64-v3",)),
    Build(
        "neon",
        "aarch64-linux-gnu-gcc",
        ("-march=armv8-a",),
        run=("qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"),
        num_models=60,
    ),
)
PACKAGES = {
    "gcc": "gcc libc6-dev",
    "aarch64-linux-gnu-gcc": "gcc-aarch64-linux-gnu libc6-dev-arm64-cross",
    "qemu-aarch64-static": "qemu-user-static",
}
"""Debian's packages of the tools."""


def main() -> int:
    """Run the builds that were asked for, all by default."""
    parser = argparse.ArgumentParser(prog="make sanitize", description=__doc__)
    parser.add_argument("--build", choices=[build.name for build in BUILDS], action="append", help="only this one")
    parser.add_argument("--models", type=int, help="random models of each build")
    parser.add_argument("--seed", type=int, default=1, help="of the first model")
    parser.add_argument("--driver-only", action="store_true", help="leave out the kernel's own tests")
    options = parser.parse_args()
    builds = [build for build in BUILDS if not options.build or build.name in options.build]
    if platform.machine() != "x86_64":
        print(f"make sanitize needs an x86-64 machine, this is {platform.machine()}", file=sys.stderr)
        return 2
    tools = {tool for build in builds for tool in (build.compiler, *build.run[:1])}
    if missing := sorted(tool for tool in tools if shutil.which(tool) is None):
        packages = " ".join(PACKAGES[tool] for tool in missing)
        print(f"{', '.join(missing)} missing: run apt-get install {packages}", file=sys.stderr)
        return 2
    failed = []
    with tempfile.TemporaryDirectory(prefix="sanitize-") as scratch:
        for build in builds:
            if not _driver(build, Path(scratch), options.seed, options.models or build.num_models):
                failed.append(f"{build.name} (driver)")
            if not options.driver_only and not build.run and not _kernel_tests(build, Path(scratch)):
                failed.append(f"{build.name} (kernel tests)")
    print(f"FAILED: {', '.join(failed)}" if failed else "The sanitizers found nothing")
    return 1 if failed else 0


def kernel_defines() -> list[str]:
    """The sizes that the kernel is compiled with."""
    from llm.llama.kernel import SIZES

    return [f"-D{name}={size}" for name, size in SIZES.items()]


def _driver(build: Build, scratch: Path, seed: int, num_models: int) -> bool:
    binary = scratch / f"fuzz-{build.name}"
    common = ("-std=gnu11", "-O1", "-ffp-contract=fast", "-fopenmp", f"-I{ROOT / 'llm/llama/native'}")
    flags = (*common, *build.flags, *SANITIZE, *kernel_defines())
    print(f"{build.name}: compiling the driver", flush=True)
    if not _run([build.compiler, *flags, str(DRIVER), "-o", str(binary), "-lm"]):
        return False
    print(f"{build.name}: {num_models} random models from seed {seed}", flush=True)
    return _run([*build.run, str(binary), "run", str(seed), str(num_models)])


def _kernel_tests(build: Build, scratch: Path) -> bool:
    """Python is not sanitized itself: the runtime is loaded before it, and watches torch's memory by its allocator."""
    wrapper = scratch / f"cc-{build.name}"
    # The kernel's own flags name -march=native: what comes last is what counts.
    wrapper.write_text(f'#!/bin/sh\nexec {build.compiler} "$@" {shlex.join((*build.flags, "-O1", *SANITIZE))}\n')
    wrapper.chmod(0o700)
    runtimes = [_runtime(build.compiler, name) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    variables = {
        "CC": str(wrapper),
        "SERVE_CACHE": str(scratch / f"cache-{build.name}"),
        "LD_PRELOAD": ":".join(runtimes),
        "PYTHONMALLOC": "malloc",
    }
    print(f"{build.name}: compiling the kernel, and its tests", flush=True)
    # The kernel is compiled first, since the compiler itself must not be watched.
    without = {name: value for name, value in variables.items() if name != "LD_PRELOAD"}
    return _run([sys.executable, "-c", COMPILE, str(wrapper)], without) and _run(
        [sys.executable, "-c", TEST, "tests/llm/llama/test_kernel.py", "-k", KERNEL_TESTS, "-q", "--timeout=1800"],
        variables,
    )


def _runtime(compiler: str, name: str) -> str:
    found = subprocess.run([compiler, f"-print-file-name={name}"], check=True, capture_output=True, text=True)
    return os.path.realpath(found.stdout.strip())


def _run(command: list[str], variables: dict[str, str] | None = None) -> bool:
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "OMP_NUM_THREADS": str(NUM_THREADS),
        "OMP_WAIT_POLICY": "passive",
        **(variables or {}),
    }
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
