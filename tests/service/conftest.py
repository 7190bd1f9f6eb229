import logging
from collections.abc import Iterator
from io import StringIO

import pytest

from service.records.logs import log_handler


@pytest.fixture
def service_log() -> Iterator[StringIO]:
    """What the service logs, as people read it."""
    log = StringIO()
    handler = log_handler("human", log)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    yield log
    root.removeHandler(handler)
    root.setLevel(level)
