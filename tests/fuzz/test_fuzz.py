"""A short form of `python -m tests.fuzz`: the same laws, fewer requests."""

from collections.abc import Iterator

import pytest

from tests.fuzz.bombs import one_by_one
from tests.fuzz.runs import run
from tests.fuzz.target import Target, running

BODY = 32 * 2**20

pytestmark = pytest.mark.filterwarnings("ignore")  # the testers' own


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with running(tmp_path_factory.mktemp("fuzzed")) as started:
        yield started


@pytest.fixture(autouse=True)
def _no_faults(target: Target) -> Iterator[None]:
    yield
    assert target.faults() == []


@pytest.mark.parametrize(("kind", "requests"), [("structured", 500), ("raw bytes", 192)])
def test_whatever_is_sent_is_answered_by_the_laws(target: Target, kind: str, requests: int) -> None:
    tally = run(target.url, kind, requests, 0, lambda: None)
    assert tally.requests >= requests
    assert tally.statuses[200] > 0
    assert tally.statuses[400] > 0


def test_large_bodies_take_a_few_times_their_size(target: Target) -> None:
    names = ("the same with an emoji", "22 million empty lists", "a million wrong documents")
    reports = list(one_by_one(target, BODY, names))
    assert [report.statuses for report in reports] == [[200], [413], [400]]
    assert all(report.growth < 12 * BODY / 2**20 for report in reports), reports
