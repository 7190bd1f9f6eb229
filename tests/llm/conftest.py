import pytest

from llm.loading import prepare
from llm.references import ModelFiles


@pytest.fixture(scope="session")
def embedded() -> ModelFiles:
    """The embedded model as a checkpoint directory, in the cache of whoever runs the tests: converted once for good."""
    return prepare("embedded")
