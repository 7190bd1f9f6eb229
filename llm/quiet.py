"""Keep the warnings and progress bars of transformers out of the log while it loads or converts a model.

Deliberately not done at import: an application that uses `llm` keeps its own settings outside the block.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ALONE = threading.RLock()
"""transformers' settings, and torch's default dtype, which it changes while it loads, are the whole process's."""


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block transformers logs errors only and draws no progress bars. One thread at a time is in it."""
    from transformers.utils import logging as transformers_logging

    with _ALONE:
        verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity(logging.ERROR)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
