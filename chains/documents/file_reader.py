"""The process that reads one file and ends: content on stdin, limits as its argument, JSON on stdout.

`files.py` starts it as a script. It binds itself before it looks at the first byte of what it was given.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chains.documents.formats import FileText, Refusal

CHAINS = Path(__file__).parent.parent
NOBODY = 65534
CAP_KILL = 5
"""https://man7.org/linux/man-pages/man7/capabilities.7.html"""
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
"""https://man7.org/linux/man-pages/man2/prctl.2.html"""


def load() -> None:
    """Import whatever reading may need: where root installed it, nobody else may be able to look later."""
    # Only modules below are wanted. The package's own start imports LangChain, which would take longer than most files.
    package = sys.modules["chains"] = ModuleType("chains")
    package.__path__ = [str(CHAINS)]
    import encodings

    import charset_normalizer  # noqa: F401
    import orjson  # noqa: F401

    import chains.documents.formats.detect  # noqa: F401

    for codec in iter_modules(encodings.__path__):
        # Some are for other systems.
        with suppress(ImportError):
            import_module(f"encodings.{codec.name}")


def restrict(max_memory: int, timeout_s: float) -> None:
    """Take from this process what reading a file does not need. What is already stricter stays so."""
    wanted = {
        resource.RLIMIT_AS: max_memory,
        # Ends what spins even if nobody is left to kill it.
        resource.RLIMIT_CPU: int(timeout_s) + 1,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 0,
    }
    if sys.platform == "darwin":
        # It counts what all programs share as well, which is more than any limit that we would set.
        del wanted[resource.RLIMIT_AS]
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        ours = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (ours, ours))
    if os.geteuid() == 0 and can_end_others():
        become_nobody()
    if sys.platform == "linux":
        prctl = ctypes.CDLL(None).prctl
        # After the change of user, which would take it back.
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def can_end_others() -> bool:
    """Tell whether root may end somebody else's process. The server has as much, and has to be able to end this one."""
    if sys.platform != "linux":
        return True
    _, _, after = Path("/proc/self/status").read_text().partition("CapEff:")
    return bool(int(after.split()[0], 16) >> CAP_KILL & 1)


def become_nobody() -> None:
    """Stop being root, which may read everything and start processes whatever its limits say."""
    # A container may have taken from its root even the right to be somebody else.
    with suppress(OSError):
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def answer(content: bytes, limits: dict[str, Any]) -> FileText | Refusal:
    """Read a file, whatever it is."""
    from chains.documents.formats import FileLimits, Refusal
    from chains.documents.formats.detect import read
    from chains.errors import InputError, TooLarge

    try:
        return read(content, FileLimits(**limits))
    except InputError as error:
        return Refusal("TooLarge" if isinstance(error, TooLarge) else "UnreadableFile", str(error))
    except MemoryError:
        memory = f"{limits['max_memory'] >> 20:,} MiB"
        return Refusal("UnreadableFile", f"the file needs more memory than {memory} to be read")
    except RecursionError:
        return Refusal("UnreadableFile", "the file is damaged: it is nested too deeply")


def main() -> None:
    """Read the file on stdin."""
    limits = json.loads(sys.argv[1])
    load()
    restrict(limits["max_memory"], limits["timeout_s"])
    import orjson

    sys.stdout.buffer.write(orjson.dumps(answer(sys.stdin.buffer.read(), limits)))


if __name__ == "__main__":
    main()
