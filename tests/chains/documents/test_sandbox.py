"""What code that has taken over the reading process can reach. The probe tries; `probed_server.py` has the secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chains.documents import files, sandbox
from chains.documents.files import protect, protections
from chains.documents.sandbox import ARCHITECTURES, Protections
from tests.chains.documents import probe

ROOT = Path(__file__).parent.parent.parent.parent
IS_ROOT = os.geteuid() == 0
ORDINARY = (
    "setpriv --reuid=1234 --regid=1234 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
)
"""It may read where root has installed Python, until its sandbox takes that away as well."""
USERS = {
    **({"root": "", "root without capabilities": "setpriv --bounding-set=-all --inh-caps=-all"} if IS_ROOT else {}),
    "an ordinary user": ORDINARY if IS_ROOT else "",
}
PROCESSES = ("parent", "reader server", "other reader")
LEFT_BY_LANDLOCK = {
    *("add_key", "keyctl", "another Landlock ruleset", "be dumpable", "chdir", "chmod", "chroot", "personality"),
    *("clock of another process", "clone3", "fork", "thread", "ignore the CPU limit", "interval timer", "timer"),
    *("executable memory", "make memory executable", "ioctl", "setns", "unshare a user namespace", "unshare files"),
    *("message queue", "semaphore", "shared memory"),
    *("read an inherited descriptor", "write elsewhere than to the answer"),  # /dev/null, its stderr
    *(f"{call} {file}" for call in ("stat", "statx") for file in ("/dev/null", "/etc/passwd", "own environ")),
    *(f"{call} {file}" for call in ("stat", "statx") for file in ("key file", ".env")),
    *(f"{who}: {act}" for who in PROCESSES for act in ("affinity", "limits", "setpriority")),
    *(f"{who}: process_madvise" for who in PROCESSES),
}
"""What a kernel without seccomp allows, if it has Landlock: no content, no socket, no signal."""
LEFT_BY_LIMITS = LEFT_BY_LANDLOCK | {
    *("exec", "execveat", "link", "make a folder", "rename", "truncate", "unlink"),
    *(f"{who}: {act}" for who in PROCESSES for act in ("kill 0", "SIGTERM", "SIGTERM by tgkill")),
}
"""What a kernel with neither allows: still no file's content and no socket, as no descriptor can be made."""
SECRETS = {
    *("open key file", "open .env", "open own environ", "open /etc/passwd", "list /", "create a file"),
    *("TCP connect", "UDP send", "Unix socket", "abstract socket", "TCP listen", "bpf", "io_uring", "memfd_create"),
    *(f"{who}: {act}" for who in PROCESSES for act in ("ptrace", "process_vm_readv", "open environ")),
    *(f"{who}: {act}" for who in PROCESSES for act in ("open mem", "open maps", "list fd")),
    "parent: open fd/0",  # that of the others is a socket, which nobody can open
}


SANDBOXES = {
    "full": [],
    "Landlock alone": ["restrict_by_seccomp"],
    "seccomp alone": ["restrict_by_landlock"],
    "limits alone": ["restrict_by_seccomp", "restrict_by_landlock"],
    "none": ["enter", "hide_memory"],
}
"""Functions of the sandbox that do nothing."""


@pytest.fixture(scope="module", params=USERS)
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a server as one of `USERS` prints of the probe in its reader, for each of `SANDBOXES`."""
    folder, scripts = tmp_path_factory.mktemp("probed"), []
    for name, without in SANDBOXES.items():
        scripts.append(str(folder / f"{name}.py"))
        Path(scripts[-1]).write_text(
            f"import runpy, sys\nsys.path.append({str(ROOT)!r})\n"
            f"runpy.run_path({probe.__file__!r})['start']({str(files.READER)!r}, {[*without, 'lower_priority']!r})\n"
        )
    module = "tests.chains.documents.probed_server"
    command = [*USERS[request.param].split(), sys.executable, "-m", module, json.dumps(scripts)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    found = dict(zip(SANDBOXES, map(json.loads, ran.stdout.splitlines()), strict=True))
    assert {each["uid"] for each in found.values()} == {
        0 if "root" in request.param else 1234 if IS_ROOT else os.getuid()
    }
    return found


@pytest.fixture(scope="module")
def in_effect() -> Protections:
    return protections()


@pytest.mark.skipif(sys.platform != "linux", reason="these protections are Linux's")
class TestProbe:
    def test_code_in_the_parser_reaches_nothing(self, probed: dict[str, Any], in_effect: Protections) -> None:
        left = set() if in_effect.seccomp else LEFT_BY_LANDLOCK if in_effect.landlock >= 6 else LEFT_BY_LIMITS
        assert set(probed["full"]["reached"]) <= left
        if in_effect.seccomp:
            assert (probed["full"]["key"], probed["full"]["signals"]) == ("secret", [])

    @pytest.mark.parametrize("kernel", ["Landlock alone", "seccomp alone", "limits alone"])
    def test_with_an_older_kernel_it_reaches_what_the_documentation_says(
        self, probed: dict[str, Any], kernel: str, in_effect: Protections
    ) -> None:
        reached = set(probed[kernel]["reached"])
        left = LEFT_BY_LIMITS
        if kernel == "seccomp alone" and in_effect.seccomp:
            left = set()
        elif kernel == "Landlock alone" and in_effect.landlock >= 6:
            left = LEFT_BY_LANDLOCK
        assert reached <= left
        assert not reached & SECRETS

    def test_without_a_sandbox_the_probe_reaches_the_secrets(self, probed: dict[str, Any]) -> None:
        """So the tests above can fail."""
        reached = set(probed["none"]["reached"])
        allowed = {"bpf", "io_uring", "memfd_create"}  # administrators may have turned these off
        assert reached >= SECRETS - allowed


class TestReport:
    def test_a_kernel_with_everything_lacks_nothing(self) -> None:
        assert Protections(own_user=False, not_dumpable=True, landlock=6, seccomp=True).missing() == []

    @pytest.mark.parametrize(
        ("lacks", "said"),
        [
            ({"seccomp": False}, "any system call"),
            ({"landlock": 0}, "Landlock (only seccomp"),
            ({"landlock": 3}, "version 3 refuses files;"),
            ({"not_dumpable": False}, "read the reader's memory"),
        ],
        ids=str,
    )
    def test_what_is_missing_is_logged_at_start(
        self, lacks: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        given = {"own_user": False, "not_dumpable": True, "landlock": 7, "seccomp": True} | lacks
        monkeypatch.setattr(files, "protections", lambda: Protections(**given))
        monkeypatch.setattr(files, "hide_memory", lambda: True)
        protect()
        (record,) = caplog.records
        assert said in record.getMessage()
        assert record.levelname == "WARNING"

    def test_a_reader_that_does_not_work_is_logged(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(files, "READER", tmp_path / "missing.py")
        monkeypatch.setattr(files, "hide_memory", lambda: True)
        protect()
        assert "does not work" in caplog.text


class TestFilter:
    def test_the_numbers_are_those_of_the_kernels_headers(self) -> None:
        """Of the architecture that runs this; both were compared with the headers once."""
        headers = [Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), Path("/usr/include/asm-generic/unistd.h")]
        for header, architecture in zip(headers, ARCHITECTURES.values(), strict=True):
            if header.exists():
                text = header.read_text()
                for name, number in architecture.calls.items():
                    # The generic ones are macros of a few kinds.
                    assert any(f"{prefix}{name} {number}\n" in text for prefix in ("__NR_", "__NR3264_")), name

    @pytest.mark.skipif(sys.platform != "linux", reason="seccomp is Linux's")
    def test_calls_under_the_numbers_of_x32_end_the_process(self) -> None:
        script = f"""if True:
            import ctypes, os, runpy
            from types import SimpleNamespace
            sandbox = SimpleNamespace(**runpy.run_path({sandbox.__file__!r}))
            sandbox.libc().prctl(sandbox.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            print(sandbox.restrict_by_seccomp(), flush=True)
            sandbox.libc().syscall(ctypes.c_long(sandbox.X32 | 39))
            os._exit(7)
        """
        ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ran.returncode == (-31 if ran.stdout == "True\n" and os.uname().machine == "x86_64" else 7)
