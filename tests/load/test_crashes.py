"""The crash harness, a round of it; `python -m tests.load.crashes` is the long form."""

import pytest

from tests.load.crashes import run


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_kill_9_loses_nothing_that_was_answered(kind: str) -> None:
    tally = run(1, kind, seed=5)
    assert tally.wrong == []
    assert tally.counts["rounds"] == 1
    assert tally.counts["import"] > 0
    assert tally.counts["arrays compared"] > 0
