"""The process that reads one file and ends: content on stdin, limits as its argument, JSON on stdout.

`files.py` starts it as a script. It binds itself before it looks at the first byte of what it was given.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chains.documents.formats import FileText, Refusal

CHAINS = Path(__file__).parent.parent


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
    for limit, value in wanted.items():
        hard = resource.getrlimit(limit)[1]
        ours = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (ours, ours))


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
    restrict(limits["max_memory"], limits["timeout_s"])
    # Only modules below are wanted. The package's own start imports LangChain, which would take longer than most files.
    package = sys.modules["chains"] = ModuleType("chains")
    package.__path__ = [str(CHAINS)]
    import orjson

    sys.stdout.buffer.write(orjson.dumps(answer(sys.stdin.buffer.read(), limits)))


if __name__ == "__main__":
    main()
