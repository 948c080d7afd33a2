"""The next batch, as a table and as laws."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Stage
from app.engine.batching import Job, WaitingJobs, submission_jobs
from tests.engine.stub import context, text

Q, D = ("m", Stage.SECOND), ("m", Stage.FIRST)


def jobs(lane: tuple[str, Stage], *lengths: int, context_rows: int = 0, background: bool = False) -> list[Job]:
    texts = [text(*range(n)) for n in lengths]
    return submission_jobs(lane, texts, context(1.0), hidden_size=4, context_rows=context_rows, background=background)


def lengths(batch: list[Job]) -> list[int]:
    return [len(job.text.input_ids) for job in batch]


@pytest.mark.parametrize(
    ("waiting", "budget", "expected"),
    [
        ([], 100, []),
        ([5], 100, [5]),
        ([5], 1, [5]),  # the oldest always runs, however big
        ([5, 5, 5], 10, [5, 5]),
        ([5, 90, 6, 5], 20, [5, 5, 6]),  # the nearest in length first
        ([90, 5, 5], 100, [90]),  # padded cost: longest x rows
        ([10, 1, 1, 1], 40, [10, 1, 1, 1]),
    ],
)
def test_table(waiting: list[int], budget: int, expected: list[int]) -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *waiting))
    assert lengths(queue.next_batch(budget)) == expected


def test_context_rows_count_in_the_second_stage_alone() -> None:
    assert [job.cost for job in jobs(Q, 5, context_rows=520)] == [525]
    assert [job.cost for job in jobs(D, 5, context_rows=520)] == [5]


def test_lanes_take_turns() -> None:
    queue = WaitingJobs()
    queue.add(jobs(D, *[5] * 4))
    queue.add(jobs(Q, *[5] * 4))
    served = [queue.next_batch(10)[0].submission.lane for _ in range(4)]
    assert served == [D, Q, D, Q]


def test_the_background_waits_but_never_stands_still() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 6, background=True))
    queue.add(jobs(Q, *[7] * 20))
    assert (queue.foreground.tokens, queue.background.tokens) == (140, 30)
    served = [lengths(queue.next_batch(1))[0] for _ in range(26)]
    assert served == [7] * 8 + [5] + [7] * 8 + [5] + [7] * 4 + [5] * 4
    assert len(queue) == 0
    queue.add(jobs(Q, 5, background=True))
    queue.add(jobs(Q, 7))
    assert lengths(queue.next_batch(1)) == [7]
    assert sorted(lengths(queue.drain())) == [5]


def test_a_single_query_passes_a_bulk_request() -> None:
    queue = WaitingJobs()
    bulk = jobs(Q, *[5] * 1000)
    queue.add(bulk)
    for _ in range(10):
        queue.next_batch(20)
    single = jobs(Q, 7)
    queue.add(single)
    waited = next(i for i in range(1000) if single[0] in queue.next_batch(20))
    assert waited <= 1


def test_requests_of_one_size_run_side_by_side() -> None:
    queue = WaitingJobs()
    first, second = jobs(Q, *[5] * 100), jobs(Q, *[5] * 100)
    queue.add(first)
    queue.add(second)
    run = [job for _ in range(20) for job in queue.next_batch(25)]
    assert sum(job in first for job in run) == 50


def test_callers_that_have_gone_are_dropped() -> None:
    queue = WaitingJobs()
    gone, stays = jobs(Q, 5, 5), jobs(Q, 5)
    queue.add(gone)
    queue.add(stays)
    gone[0].submission.future.cancel()
    assert queue.next_batch(100) == stays
    assert (len(queue), queue.foreground.tokens) == (0, 0)


@given(st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), max_size=8), st.integers(1, 200))
def test_every_job_runs_once_and_batches_keep_the_budget(requests: list[list[int]], budget: int) -> None:
    queue = WaitingJobs()
    added = []
    for i, request in enumerate(requests):
        made = jobs(Q if i % 2 else D, *request)
        queue.add(made)
        added += made
    run: list[Job] = []
    while batch := queue.next_batch(budget):
        assert len({job.submission.lane for job in batch}) == 1
        assert len(batch) == 1 or max(job.cost for job in batch) * len(batch) <= budget
        run += batch
        assert queue.foreground.tokens == sum(job.cost for job in added) - sum(job.cost for job in run)
    assert sorted(map(id, run)) == sorted(map(id, added))


@given(st.lists(st.integers(1, 50), min_size=2, max_size=40), st.integers(50, 300))
def test_the_oldest_job_is_in_the_next_batch(waiting: list[int], budget: int) -> None:
    queue = WaitingJobs()
    made = jobs(Q, *waiting)
    queue.add(made)
    left = list(made)
    while batch := queue.next_batch(budget):
        assert batch[0] is left[0]
        left = [job for job in left if job not in batch]
