"""How much memory a server takes at most while it is under load, its child processes included."""

import shutil
import subprocess
import threading
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]

PERIOD_S = 1.0


class PeakMemory:
    """Watches a process tree while it is entered.

    Host memory is the proportional set size (PSS): what processes share is counted once, and so are the pages of
    files that are mapped into memory. Device memory is all that is taken on the first GPU.
    """

    def __init__(self, pid: int) -> None:
        self.host_bytes = 0
        self.device_bytes: int | None = None
        self._root = psutil.Process(pid)
        self._nvidia_smi = shutil.which("nvidia-smi")
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.host_bytes = max(self.host_bytes, tree_bytes(self._root))
            if self._nvidia_smi:
                self.device_bytes = max(self.device_bytes or 0, _device_bytes(self._nvidia_smi))
            if self._is_over.wait(PERIOD_S):
                return


def tree_bytes(root: psutil.Process) -> int:
    """The proportional set size of a process and its descendants; zero when it is gone."""
    total = 0
    try:
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total


def _device_bytes(nvidia_smi: str) -> int:
    query = [nvidia_smi, "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    return int(lines[0]) * 2**20 if lines and lines[0].isdigit() else 0
