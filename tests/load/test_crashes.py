"""The crash harness, a few rounds of it; `python -m tests.load.crashes` is the long form."""

import pytest

from tests.load.crashes import run


@pytest.mark.parametrize(("kind", "rounds"), [("sqlite", 2), ("postgres", 1)])
def test_kill_9_loses_nothing_that_was_answered(kind: str, rounds: int) -> None:
    tally = run(rounds, kind, seed=5)
    assert tally.wrong == []
    assert tally.counts["rounds"] == rounds
    assert tally.counts["import"] > 0
    assert tally.counts["arrays compared"] > 0
