"""What code that has taken over the reading process can reach. The probe tries; `probed_server.py` has the secrets."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from chains.documents import files, sandbox
from chains.documents.files import protect, protections
from chains.documents.sandbox import ARCHITECTURES, Protections
from tests.chains.documents import probe

ROOT = Path(__file__).parent.parent.parent.parent
IS_ROOT = os.geteuid() == 0
ORDINARY = "setpriv --reuid=1234 --regid=1234 --clear-groups --inh-caps=+dac_read_search --ambient-caps=+dac_read_search"
"""It may read where root has installed Python, until its sandbox takes that away as well."""
USERS = {
    **({"root": "", "root without capabilities": "setpriv --bounding-set=-all --inh-caps=-all"} if IS_ROOT else {}),
    "an ordinary user": ORDINARY if IS_ROOT else "",
}
LEFT_BY_LANDLOCK = {
    *("add_key", "keyctl", "another Landlock ruleset", "be dumpable", "chdir", "chmod", "chroot", "personality"),
    *("clock of another process", "clone3", "fork", "thread", "ignore the CPU limit", "interval timer", "timer"),
    *("executable memory", "make memory executable", "ioctl", "setns", "unshare a user namespace", "unshare files"),
    *("message queue", "semaphore", "shared memory"),
    *("read an inherited descriptor", "write elsewhere than to the answer"),  # /dev/null, its stderr
    *(f"{call} {file}" for call in ("stat", "statx") for file in ("/dev/null", "/etc/passwd", "own environ")),
    *(f"{call} {file}" for call in ("stat", "statx") for file in ("key file", ".env")),
    *(f"{who}: {act}" for who in ("parent", "other reader") for act in ("affinity", "limits", "setpriority")),
    *(f"{who}: process_madvise" for who in ("parent", "other reader")),
}
"""What a kernel without seccomp allows, if it has Landlock: no content, no socket, no signal."""
LEFT_BY_LIMITS = LEFT_BY_LANDLOCK | {
    *("exec", "execveat", "link", "make a folder", "rename", "truncate", "unlink"),
    *("parent: kill 0", "parent: SIGTERM", "parent: SIGTERM by tgkill", "other reader: kill 0"),
}
"""What a kernel with neither allows: still no file's content and no socket, as no descriptor can be made."""
SECRETS = {
    *("open key file", "open .env", "open own environ", "open /etc/passwd", "list /", "create a file"),
    *("TCP connect", "UDP send", "Unix socket", "abstract socket", "TCP listen", "bpf", "io_uring", "memfd_create"),
    *(f"{who}: {act}" for who in ("parent", "other reader") for act in ("ptrace", "process_vm_readv", "open environ")),
    *(f"{who}: open {file}" for who in ("parent", "other reader") for file in ("mem", "maps", "fd/0")),
}


def probed(folder: Path, user: str, *without: str, memory: str = "hidden") -> dict[str, Any]:
    """Run a server as a user of `USERS`, and the probe in its reader; some functions of the sandbox do nothing."""
    script = folder / "script.py"
    script.write_text(
        f"import runpy, sys\nsys.path.append({str(ROOT)!r})\n"
        f"runpy.run_path({probe.__file__!r})['start']({str(files.READER)!r}, {without!r})\n"
    )
    command = [*USERS[user].split(), sys.executable, "-m", "tests.chains.documents.probed_server", str(script), memory]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout)
    assert (found["uid"] == 0) == user.startswith("root")
    return found


@pytest.fixture
def in_effect() -> Protections:
    return protections()


@pytest.mark.skipif(sys.platform != "linux", reason="these protections are Linux's")
class TestProbe:
    @pytest.mark.parametrize("user", USERS)
    def test_code_in_the_parser_reaches_nothing(self, tmp_path: Path, user: str, in_effect: Protections) -> None:
        found = probed(tmp_path, user)
        left = set() if in_effect.seccomp else LEFT_BY_LANDLOCK if in_effect.landlock >= 6 else LEFT_BY_LIMITS
        assert set(found["reached"]) <= left
        assert found["key"] == "secret" or not in_effect.seccomp

    @pytest.mark.parametrize("user", USERS)
    @pytest.mark.parametrize("kernel", ["Landlock alone", "seccomp alone", "neither"])
    def test_with_an_older_kernel_it_reaches_what_the_documentation_says(
        self, tmp_path: Path, user: str, kernel: str, in_effect: Protections
    ) -> None:
        lacks = {"Landlock alone": ["seccomp"], "seccomp alone": ["landlock"], "neither": ["seccomp", "landlock"]}
        reached = set(probed(tmp_path, user, *(f"restrict_by_{each}" for each in lacks[kernel]))["reached"])
        if kernel == "seccomp alone" and in_effect.seccomp:
            assert reached == set()
        elif kernel == "Landlock alone" and in_effect.landlock >= 6:
            assert reached <= LEFT_BY_LANDLOCK
        else:
            assert reached <= LEFT_BY_LIMITS
        assert not reached & SECRETS

    @pytest.mark.parametrize("user", USERS)
    def test_without_a_sandbox_the_probe_reaches_the_secrets(self, tmp_path: Path, user: str) -> None:
        """So the tests above can fail."""
        reached = set(probed(tmp_path, user, "enter", memory="plain")["reached"])
        allowed = {"bpf", "io_uring", "memfd_create"}  # administrators may have turned these off
        assert reached >= SECRETS - allowed
