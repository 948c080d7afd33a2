"""Commands run in the test's own process: what they change of it is put back."""

from collections.abc import Iterator

import pytest

from tests.own_logging import own_logging


@pytest.fixture(autouse=True)
def logging_of_the_process() -> Iterator[None]:
    """A command logs to the stream that was its stderr, which is closed behind it."""
    with own_logging():
        yield
