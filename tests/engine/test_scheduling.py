"""Which jobs run next: as tables and as laws."""

import random
from collections import Counter
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import Lane, Stage
from app.engine.batching import Job, submission_jobs
from app.engine.fairness import PASSES, SLACK
from app.engine.scheduling import PATIENCE, WaitingJobs
from tests.engine.stub import context, text

LONGEST, NOW = 9, 0.0
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


def queued(queue: WaitingJobs) -> list[Job]:
    return [
        entry.job
        for lane in queue.lanes.values()
        for group in lane._groups.values()
        for client in group._clients.values()
        for entry in client._heap
    ]


def lengths(batch: list[Job]) -> list[int]:
    return [len(job.text.input_ids) for job in batch]


def all_jobs(queue: WaitingJobs) -> int:
    return sum(lane.jobs for lane in queue.lanes.values())


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
        ([50, 5, 49, 48], 150, [50, 49, 48]),  # not the shortest
        ([90, 5, 5], 100, [90]),  # padded cost: longest x rows
        ([10, 1, 1, 1], 40, [10, 1, 1, 1]),
    ],
)
def test_table(waiting: list[int], budget: int, expected: list[int]) -> None:
    queue = WaitingJobs()
    if waiting:
        queue.add(jobs(Q, *waiting))
    assert lengths(queue.next_batch(budget, NOW)) == expected


def test_context_rows_count_in_the_second_stage_alone() -> None:
    assert [job.cost for job in jobs(Q, 5, context_rows=520)] == [525]
    assert [job.cost for job in jobs(D, 5, context_rows=520)] == [5]


def test_groups_take_turns() -> None:
    queue = WaitingJobs()
    queue.add(jobs(D, *[5] * 4))
    queue.add(jobs(Q, *[5] * 4))
    served = [queue.next_batch(10, NOW)[0].submission.group for _ in range(4)]
    assert served == [D, Q, D, Q]


def test_slower_lanes_wait_but_never_stand_still() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 6, lane=Lane.BACKGROUND))
    queue.add(jobs(Q, *[6] * 6, lane=Lane.BULK))
    queue.add(jobs(Q, *[7] * 14))
    assert [queue.tokens(lane) for lane in Lane] == [98, 36, 30]
    served = [lengths(queue.next_batch(1, NOW))[0] for _ in range(26)]
    assert served == [7, 7, 7, 7, 6, 7, 7, 7, 5, 6, 7, 7, 7, 7, 6, 7, 7, 5, 7, 6, 6, 6, 5, 5, 5, 5]
    assert (all_jobs(queue), all_tokens(queue)) == (0, 0)


@given(st.lists(st.sampled_from(list(Lane)), min_size=1, max_size=60))
def test_no_lane_waits_longer_than_its_patience_and_those_of_the_others(arrivals: list[Lane]) -> None:
    """However much comes into the lanes before it."""
    queue = WaitingJobs()
    since = dict.fromkeys(Lane, 0)
    for arrival in arrivals * 4:
        queue.add(jobs(Q, 5, lane=arrival))
        queue.add(jobs(Q, 5))
        waiting = {lane for lane in Lane if queue.lanes[lane].jobs}
        (job,) = queue.next_batch(1, NOW)
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
    assert lengths(plain.next_batch(1000, NOW)) == [10]
    assert lengths(riding.next_batch(1000, NOW)) == [10, 11, 12, 9]
    assert all_tokens(riding) == 100
    riding.add(jobs(Q, 40))
    assert lengths(riding.next_batch(1000, NOW)) == [40], "more than twice as long does not pay"


def test_a_single_query_passes_a_bulk_request_of_its_own_lane() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 1000, lane=Lane.BULK))
    for _ in range(10):
        queue.next_batch(20, NOW)
    single = jobs(Q, 7, lane=Lane.BULK)
    queue.add(single)
    waited = next(i for i in range(1000) if single[0] in queue.next_batch(20, NOW))
    assert waited <= 1


@pytest.mark.parametrize("lane", Lane)
def test_requests_of_one_size_run_in_the_order_they_came(lane: Lane) -> None:
    queue = WaitingJobs()
    made = [jobs(Q, *[5] * 8, lane=lane, client="a") for _ in range(4)]
    run: list[Job] = []
    for request in made:
        queue.add(request)
        run += queue.next_batch(10, NOW)
    while batch := queue.next_batch(10, NOW):
        run += batch
    assert run == [job for request in made for job in request]


def test_small_requests_pass_a_large_one_until_its_client_has_had_what_it_needs() -> None:
    queue = WaitingJobs()
    large = jobs(Q, *[5] * 20, lane=Lane.BULK)
    queue.add(large)
    seen = []
    for _ in range(100):
        queue.add(jobs(Q, 5, 5, lane=Lane.BULK))
        queue.next_batch(5, NOW)
        seen.append(sum(job in large for job in queued(queue)))
    assert seen[30] == 20
    assert seen[60] == 0  # though there is always a smaller one


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, LONGEST)), max_size=30),
    st.lists(st.integers(1, LONGEST), min_size=1, max_size=8),
    st.sampled_from([Lane.INTERACTIVE, Lane.BULK]),
    st.booleans(),
)
def test_nobody_waits_longer_than_was_expected(
    waiting: list[tuple[str, int]], texts: list[int], lane: Lane, send_on: bool
) -> None:
    """Whatever ran before; exact but for a text of each client. Those that send on have their shares, no more."""
    queue = WaitingJobs()
    left = [job for client, length in waiting for job in jobs(Q, length, lane=lane, client=client)]
    for job in left:
        queue.add([job])
    for _ in range(len(waiting) // 3):
        left.remove(queue.next_batch(1, NOW)[0])
    made, cost = jobs(Q, *texts, lane=lane, client="a"), sum(texts)
    expected = queue.lanes[lane].ahead("a", cost) + cost
    if send_on:
        expected = 3 * (sum(job.cost for job in left if job.submission.client == "a") + cost)
    queue.add(made)
    run: list[Job] = []
    while not set(made) <= set(run):
        if send_on:
            queue.add(jobs(Q, LONGEST, lane=lane, client="b"))
            queue.add(jobs(Q, LONGEST, lane=lane, client="c"))
        run += queue.next_batch(1, NOW)
    assert sum(job.cost for job in run) <= expected + 3 * LONGEST


def test_a_lane_that_waits_for_too_long_has_every_other_batch() -> None:
    queue = WaitingJobs(late_seconds=10)
    queue.add(jobs(Q, *[5] * 6, lane=Lane.BULK))
    queue.add(jobs(Q, *[6] * 6, lane=Lane.BULK))
    queue.add(jobs(Q, *[8] * 6, lane=Lane.BACKGROUND))
    queue.add(jobs(Q, *[7] * 30))
    for job in queued(queue):
        job.submission.timing.queued_at = 100.0 if job.submission.lane is not Lane.INTERACTIVE else 111.0
    assert queue.interactive_share(110.0) == pytest.approx(4 / 5 * 8 / 9)
    assert queue.interactive_share(111.0) == pytest.approx(1 / 2 * 8 / 9)
    served = [lengths(queue.next_batch(1, 111.0))[0] for _ in range(20)]
    assert served == [
        7,
        5,
        7,
        5,
        7,
        5,
        7,
        5,
        8,
        5,
        7,
        5,
        7,
        6,
        7,
        7,
        7,
        8,
        6,
        7,
    ]  # late until the last has had its turn


def test_a_job_is_left_behind_for_nearer_lengths_a_few_times_and_no_more() -> None:
    """Batches are begun by others, and filled with its own client's later, shorter ones."""
    queue = WaitingJobs()
    [long] = jobs(Q, 100, client="a")
    queue.add([long])
    for batches in count():
        for client in ("b", "c", "a", "a", "a"):
            queue.add(jobs(Q, 20, client=client))
        if long in queue.next_batch(100, NOW):
            break
        assert batches < 2 * PASSES


@pytest.mark.parametrize("length", [5, 50])
@pytest.mark.parametrize(("backlogs", "one_at_a_time"), [(1, 2), (9, 1), (2, 8)])
def test_who_sends_one_text_at_a_time_has_no_more_than_its_share(
    backlogs: int, one_at_a_time: int, length: int
) -> None:
    """In tokens, however long its texts are."""
    queue = WaitingJobs()
    for i in range(backlogs):
        queue.add(jobs(Q, *[5] * 1000, client=f"many {i}"))
    had: Counter[str] = Counter()
    answered = {f"one {i}" for i in range(one_at_a_time)}
    while had.total() < 5000:
        for client in sorted(answered):
            queue.add(jobs(Q, length, client=client))
        (job,) = queue.next_batch(1, NOW)
        had[job.submission.client] += job.cost
        answered = {job.submission.client} if job.submission.client.startswith("one") else set()
    assert len(had) == backlogs + one_at_a_time
    assert max(had.values()) - min(had.values()) <= 2 * length


def test_ever_new_clients_do_not_keep_the_others_waiting() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 100, client="old"))
    run: list[Job] = []
    for i in range(300):
        queue.add(jobs(Q, 5, client=f"new {i}"))
        run += queue.next_batch(1, NOW)
        (group,) = queue.lanes[Lane.INTERACTIVE]._groups.values()
        assert len(group._gone) <= 2 * len(group._clients) + SLACK
    assert sum(job.submission.client == "old" for job in run) >= 20


def test_clients_share_equally_however_many_requests_they_have() -> None:
    queue = WaitingJobs()
    for _ in range(20):
        queue.add(jobs(Q, *[5] * 20, lane=Lane.BULK, client="many"))
    queue.add(jobs(Q, *[10] * 20, lane=Lane.BULK, client="few"))
    run = [queue.next_batch(1, NOW)[0] for _ in range(30)]
    tokens = {name: sum(job.cost for job in run if job.submission.client == name) for name in ("many", "few")}
    assert tokens == {"many": 100, "few": 100}


def test_a_client_that_comes_late_is_owed_nothing_for_its_absence() -> None:
    queue = WaitingJobs()
    queue.add(jobs(Q, *[5] * 100, client="early"))
    for _ in range(40):
        queue.next_batch(1, NOW)
    queue.add(jobs(Q, *[5] * 100, client="late"))
    run = [queue.next_batch(1, NOW)[0].submission.client for _ in range(20)]
    assert abs(run.count("late") - 10) <= 1


def test_what_is_forgotten_is_out_of_the_counts_at_once() -> None:
    queue = WaitingJobs()
    gone, stays = jobs(Q, 5, 5), jobs(Q, 5)
    queue.add(gone)
    queue.add(stays)
    assert queue.lanes[Lane.INTERACTIVE].oldest is gone[0].submission
    assert queue.forget(gone[0].submission) == 2
    assert (all_jobs(queue), all_tokens(queue)) == (1, 5)
    assert queue.lanes[Lane.INTERACTIVE].oldest is stays[0].submission
    assert queue.next_batch(100, NOW) == stays
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
    assert lengths(queue.next_batch(1000, NOW)) == [5] * 10
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
            run += queue.next_batch(budget, NOW)
        if leaves:
            queue.forget(made[0].submission)
            made = [job for job in made if job in run]
        expected += made
    while batch := queue.next_batch(budget, NOW):
        assert len({job.submission.group for job in batch}) == 1
        assert len(batch) == 1 or max(job.cost for job in batch) * len(batch) <= budget
        run += batch
        assert all_tokens(queue) == sum(job.cost for job in expected) - sum(job.cost for job in run)
        assert all_jobs(queue) == len(expected) - len(run)
    assert sorted(map(id, run)) == sorted(map(id, expected))
    assert all(lane.oldest is None and not lane._groups for lane in queue.lanes.values())


@given(st.lists(st.integers(1, 50), min_size=2, max_size=40), st.integers(50, 300))
def test_the_oldest_job_is_in_the_next_batch(waiting: list[int], budget: int) -> None:
    queue = WaitingJobs()
    made = jobs(Q, *waiting)
    queue.add(made)
    left = list(made)
    while batch := queue.next_batch(budget, NOW):
        assert batch[0] is left[0]
        left = [job for job in left if job not in batch]


def test_the_background_goes_on_while_both_other_lanes_are_late() -> None:
    queue = WaitingJobs(late_seconds=10)
    queue.add(jobs(Q, *[5] * 50, lane=Lane.BACKGROUND))
    lanes = (Lane.INTERACTIVE, Lane.BULK)
    ran = Counter[Lane]()
    for turn in range(1000):
        for lane in lanes:  # somebody in each has always waited for longer than allowed
            queue.add(jobs(Q, 5, lane=lane, client=f"{lane} {turn}"))
        (job,) = queue.next_batch(1, NOW + 11 + turn)
        ran[job.submission.lane] += 1
    assert ran[Lane.BACKGROUND] == 50
    assert abs(ran[Lane.INTERACTIVE] - ran[Lane.BULK]) <= 1
