"""Which jobs run next: as tables and as laws."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Lane, Stage
from app.engine.batching import Job, submission_jobs
from app.engine.scheduling import PATIENCE, WaitingJobs
from tests.engine.stub import context, text

Q, D = ("m", Stage.SECOND), ("m", Stage.FIRST)


def jobs(
    group: tuple[str, Stage],
    *lengths: int,
    context_rows: int = 0,
    lane: Lane = Lane.INTERACTIVE,
    client: str = "",
) -> list[Job]:
    texts = [text(*range(n)) for n in lengths]
    return submission_jobs(
        group, texts, context(1.0), hidden_size=4, context_rows=context_rows, lane=lane, client=client
    )


def lengths(batch: list[Job]) -> list[int]:
    return [len(job.text.input_ids) for job in batch]


def all_tokens(queue: WaitingJobs) -> int:
    return queue.tokens(*Lane)


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


def test_groups_take_turns() -> None:
    queue = WaitingJobs()
    queue.add(jobs(D, *[5] * 4))
    queue.add(jobs(Q, *[5] * 4))
    served = [queue.next_batch(10)[0].submission.group for _ in range(4)]
    assert served == [D, Q, D, Q]


def test_slower_lanes_wait_but_never_stand_still() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 6, lane=Lane.BACKGROUND))
    queue.add(jobs(Q, *[6] * 6, lane=Lane.BULK))
    queue.add(jobs(Q, *[7] * 14))
    assert [queue.tokens(lane) for lane in Lane] == [98, 36, 30]
    served = [lengths(queue.next_batch(1))[0] for _ in range(26)]
    assert served == [7, 7, 7, 7, 6, 7, 7, 7, 5, 6, 7, 7, 7, 7, 6, 7, 7, 5, 7, 6, 6, 6, 5, 5, 5, 5]
    assert (len(queue), all_tokens(queue)) == (0, 0)


@given(st.lists(st.sampled_from(list(Lane)), min_size=1, max_size=60))
def test_no_lane_waits_longer_than_its_patience_and_those_of_the_others(arrivals: list[Lane]) -> None:
    """However much comes into the lanes before it."""
    queue = WaitingJobs()
    since = dict.fromkeys(Lane, 0)
    for arrival in arrivals * 4:
        queue.add(jobs(Q, 5, lane=arrival))
        queue.add(jobs(Q, 5))
        waiting = {lane for lane in Lane if queue.lanes[lane].jobs}
        (job,) = queue.next_batch(1)
        for lane in waiting:
            since[lane] = 0 if lane is job.submission.lane else since[lane] + 1
        assert since[Lane.BULK] <= PATIENCE[Lane.BULK] + 1
        assert since[Lane.BACKGROUND] <= PATIENCE[Lane.BACKGROUND] + 1


def test_spare_room_is_filled_from_slower_lanes_where_that_pays() -> None:
    plain, riding = WaitingJobs(), WaitingJobs(ride=True)
    for queue in (plain, riding):
        queue.add(jobs(Q, 10))
        queue.add(jobs(Q, 12, 90, 11, lane=Lane.BULK))
        queue.add(jobs(D, 10, lane=Lane.BULK))
        queue.add(jobs(Q, 9, lane=Lane.BACKGROUND))
    assert lengths(plain.next_batch(1000)) == [10]
    assert lengths(riding.next_batch(1000)) == [10, 11, 12, 9]
    assert all_tokens(riding) == 100


def test_a_single_query_passes_a_bulk_request_of_its_own_lane() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 1000))
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


def test_clients_share_equally_however_many_requests_they_have() -> None:
    queue = WaitingJobs()
    for _ in range(20):
        queue.add(jobs(Q, *[5] * 20, lane=Lane.BULK, client="many"))
    queue.add(jobs(Q, *[10] * 20, lane=Lane.BULK, client="few"))
    run = [queue.next_batch(1)[0] for _ in range(30)]
    tokens = {name: sum(job.cost for job in run if job.submission.client == name) for name in ("many", "few")}
    assert tokens == {"many": 100, "few": 100}


def test_a_client_that_comes_late_is_owed_nothing_for_its_absence() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 100, client="early"))
    for _ in range(40):
        queue.next_batch(1)
    queue.add(jobs(Q, *[5] * 100, client="late"))
    run = [queue.next_batch(1)[0].submission.client for _ in range(20)]
    assert abs(run.count("late") - 10) <= 1


def test_what_is_forgotten_is_out_of_the_counts_at_once() -> None:
    queue = WaitingJobs()
    gone, stays = jobs(Q, 5, 5), jobs(Q, 5)
    queue.add(gone)
    queue.add(stays)
    assert queue.lanes[Lane.INTERACTIVE].oldest is gone[0].submission
    assert queue.forget(gone[0].submission) == 2
    assert (len(queue), all_tokens(queue)) == (1, 5)
    assert queue.lanes[Lane.INTERACTIVE].oldest is stays[0].submission
    assert queue.next_batch(100) == stays
    assert queue.forget(gone[0].submission) == 0


def test_the_forgotten_take_no_memory_behind_a_long_queue() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 10, client="a"))
    for _ in range(100):
        gone = jobs(Q, *[5] * 100, client="a")
        queue.add(gone)
        queue.forget(gone[0].submission)
    (group,) = queue.lanes[Lane.INTERACTIVE]._groups.values()
    (client,) = group._clients.values()
    assert len(client._heap) < 200
    assert lengths(queue.next_batch(1000)) == [5] * 10
    assert not queue.lanes[Lane.INTERACTIVE]._groups


REQUESTS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 50), min_size=1, max_size=8),
        st.sampled_from(list(Lane)),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([Q, D]),
        st.booleans(),
    ),
    max_size=10,
)


@given(REQUESTS, st.integers(1, 200), st.booleans(), st.randoms(use_true_random=False))
def test_every_live_job_runs_once_in_the_budget(
    requests: list[tuple[list[int], Lane, str, tuple[str, Stage], bool]],
    budget: int,
    ride: bool,
    chance: random.Random,
) -> None:
    queue = WaitingJobs(ride=ride)
    expected: list[Job] = []
    run: list[Job] = []
    for texts, lane, client, group, leaves in requests:
        made = jobs(group, *texts, lane=lane, client=client)
        queue.add(made)
        if chance.random() < 0.3:
            run += queue.next_batch(budget)
        if leaves:
            queue.forget(made[0].submission)
            made = [job for job in made if job in run]
        expected += made
    while batch := queue.next_batch(budget):
        assert len({job.submission.group for job in batch}) == 1
        assert len(batch) == 1 or max(job.cost for job in batch) * len(batch) <= budget
        run += batch
        assert all_tokens(queue) == sum(job.cost for job in expected) - sum(job.cost for job in run)
        assert len(queue) == len(expected) - len(run)
    assert sorted(map(id, run)) == sorted(map(id, expected))
    assert all(lane.oldest is None and not lane._groups for lane in queue.lanes.values())


@given(st.lists(st.integers(1, 50), min_size=2, max_size=40), st.integers(50, 300))
def test_the_oldest_job_is_in_the_next_batch(waiting: list[int], budget: int) -> None:
    queue = WaitingJobs()
    made = jobs(Q, *waiting)
    queue.add(made)
    left = list(made)
    while batch := queue.next_batch(budget):
        assert batch[0] is left[0]
        left = [job for job in left if job not in batch]
