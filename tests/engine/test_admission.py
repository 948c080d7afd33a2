"""Room in the queue and estimates of time, as tables."""

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain import ANYBODY, Caller, Lane, Stage
from app.engine.admission import Admission
from app.engine.batching import Job, submission_jobs
from app.engine.scheduling import WaitingJobs
from app.errors import DeadlineExceeded, QueueFull, TooManyTokens
from tests.engine.stub import context, text

NOW = 1000.0


def one(lane: Lane, tokens: int, client: str = "") -> list[Job]:
    """A request of one text."""
    some = [text(*range(tokens))]
    return submission_jobs(
        ("m", Stage.SECOND), some, context(1.0), hidden_size=4, context_rows=0, lane=lane, client=client
    )


def desk(
    *waiting: tuple[Lane, int] | tuple[Lane, int, str],
    running: int = 0,
    seconds: float = 0.0,
    rate: float | None = None,
) -> Admission:
    """With so many tokens of clients waiting in lanes; `rate`: of each of two workers, tokens a second."""
    queue = WaitingJobs()
    for request in waiting:
        queue.add(one(*request))
    admission = Admission(queue, queue_tokens=1000, queue_seconds=seconds, workers=2)
    admission.running_tokens = running
    if rate is not None:
        admission.measure(100, 100 / rate)
    return admission


@pytest.mark.parametrize(
    ("admission", "lane", "cost", "fits"),
    [
        (desk(), Lane.BULK, 1000, True),  # alone a request of any allowed size fits
        (desk((Lane.INTERACTIVE, 1)), Lane.BULK, 900, False),
        (desk((Lane.BULK, 500)), Lane.BULK, 400, True),
        (desk((Lane.BULK, 500)), Lane.BULK, 401, False),  # a tenth is kept for few texts
        (desk((Lane.BULK, 500)), Lane.INTERACTIVE, 500, True),
        (desk((Lane.BULK, 500)), Lane.INTERACTIVE, 501, False),
        (desk((Lane.BULK, 400), running=100), Lane.INTERACTIVE, 501, False),
        (desk((Lane.BACKGROUND, 900)), Lane.INTERACTIVE, 1000, True),  # nobody waits for the background
        (desk((Lane.BULK, 900)), Lane.BACKGROUND, 1000, True),
        (desk((Lane.BACKGROUND, 900)), Lane.BACKGROUND, 101, False),
    ],
)
def test_room(admission: Admission, lane: Lane, cost: int, fits: bool) -> None:
    if fits:
        admission.check(lane, [cost], ANYBODY, NOW)
    else:
        with pytest.raises(QueueFull):
            admission.check(lane, [cost], ANYBODY, NOW)


@pytest.mark.parametrize(
    ("admission", "lane", "cost", "fits"),
    [
        (desk(), Lane.INTERACTIVE, 1000, True),  # where nobody waits it is as without shares
        (desk((Lane.INTERACTIVE, 500, "a")), Lane.INTERACTIVE, 250, True),
        (desk((Lane.INTERACTIVE, 500, "a")), Lane.INTERACTIVE, 251, False),  # three quarters are enough for one
        (desk((Lane.INTERACTIVE, 750, "b")), Lane.INTERACTIVE, 187, True),  # of what is left as well
        (desk((Lane.INTERACTIVE, 750, "b")), Lane.INTERACTIVE, 188, False),
        (desk((Lane.INTERACTIVE, 200, "a"), (Lane.BULK, 400, "b")), Lane.INTERACTIVE, 250, True),
        (desk((Lane.INTERACTIVE, 200, "a"), (Lane.BULK, 400, "b")), Lane.INTERACTIVE, 251, False),
        (desk((Lane.INTERACTIVE, 200, "a"), (Lane.BULK, 500, "b")), Lane.BULK, 100, True),
        (desk((Lane.INTERACTIVE, 200, "a"), (Lane.BULK, 500, "b")), Lane.BULK, 101, False),  # of nine tenths
        (desk(running=200), Lane.INTERACTIVE, 601, False),
        (desk((Lane.BULK, 700, "a")), Lane.BACKGROUND, 1000, True),
        (desk((Lane.BACKGROUND, 700, "a")), Lane.BACKGROUND, 51, False),
    ],
)
def test_shares_of_the_room(admission: Admission, lane: Lane, cost: int, fits: bool) -> None:
    if fits:
        admission.check(lane, [cost], Caller("a"), NOW)
    else:
        with pytest.raises(QueueFull):
            admission.check(lane, [cost], Caller("a"), NOW)


@given(
    asked=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from([Lane.INTERACTIVE, Lane.BULK]), st.integers(1, 900)),
        max_size=60,
    )
)
def test_there_is_always_room_for_who_holds_nothing(asked: list[tuple[str, Lane, int]]) -> None:
    """Whatever others ask for, in whichever order: each leaves a quarter of what it found."""
    queue = WaitingJobs()
    admission = Admission(queue, queue_tokens=1000, queue_seconds=0.0, workers=2)
    queue.add(one(Lane.INTERACTIVE, 1, "first"))  # alone a request of any size would fit
    for client, lane, cost in asked:
        try:
            admission.check(lane, [cost], Caller(client), NOW)
        except QueueFull:
            continue
        queue.add(one(lane, cost, client))
    left = 1000 - queue.tokens(Lane.INTERACTIVE, Lane.BULK)
    assert left >= 999 / 4 ** len({client for client, _, _ in asked})
    admission.check(Lane.INTERACTIVE, [int(0.75 * left)], Caller("new"), NOW)


def test_clients_that_ask_for_all_of_it_end_with_equal_shares() -> None:
    """The first one has filled its share; as what waits is computed, in turns, the others come to as much."""
    queue = WaitingJobs()
    admission = Admission(queue, queue_tokens=10_000, queue_seconds=0.0, workers=2)
    for clients in (["a"], ["a", "b", "c"]):
        for _ in range(2000):
            for client in clients:
                with suppress(QueueFull):
                    admission.check(Lane.INTERACTIVE, [20], Caller(client), NOW)
                    queue.add(one(Lane.INTERACTIVE, 20, client))
            queue.next_batch(40, NOW)
    held = [queue.tokens_of(client, Lane.INTERACTIVE) for client in "abc"]
    assert held == pytest.approx([3000] * 3, abs=100)


def test_a_refusal_says_when_there_will_be_room() -> None:
    admission = desk((Lane.BULK, 900), rate=100)  # of each of two workers
    with pytest.raises(QueueFull) as refused:
        admission.check(Lane.INTERACTIVE, [300], ANYBODY, NOW)
    assert refused.value.retry_after == pytest.approx(1.0)


def test_what_is_larger_than_the_queue_is_refused_for_good() -> None:
    with pytest.raises(TooManyTokens) as refused:
        desk().check(Lane.BULK, [1001], ANYBODY, NOW)
    assert refused.value.param == "input"


def test_a_wait_that_is_too_long_is_a_full_queue() -> None:
    admission = desk((Lane.BULK, 500), seconds=2.0, rate=100)  # 2.5 s until its turn
    with pytest.raises(QueueFull) as refused:
        admission.check(Lane.BULK, [10], ANYBODY, NOW)
    assert refused.value.retry_after == pytest.approx(0.5)
    admission.check(Lane.INTERACTIVE, [10], ANYBODY, NOW)  # which goes before it
    admission.check(Lane.BACKGROUND, [10], ANYBODY, NOW)
    desk((Lane.BULK, 500), seconds=0.001).check(Lane.BULK, [10], ANYBODY, NOW)  # nothing was measured yet


def test_what_runs_is_waited_for() -> None:
    with pytest.raises(QueueFull) as refused:
        desk(running=500, seconds=2.0, rate=100).check(Lane.INTERACTIVE, [10], ANYBODY, NOW)
    assert refused.value.retry_after == pytest.approx(0.5)


def test_the_background_waits_however_long_it_takes() -> None:
    desk((Lane.BACKGROUND, 500), seconds=0.001, rate=100).check(Lane.BACKGROUND, [10], ANYBODY, NOW)


@pytest.mark.parametrize(
    ("waiting", "client", "wait"),
    [
        ([(Lane.BULK, 300, "a"), (Lane.BULK, 100, "b")], "a", 6.0),  # b has its turns meanwhile, and may go on
        ([(Lane.BULK, 300, "a"), (Lane.BULK, 100, "b")], "b", 2.2),  # as does a, but no more than b
        ([(Lane.BULK, 300, "a"), (Lane.BULK, 100, "b")], "new", 0.4),
        ([(Lane.BULK, 300, "a"), (Lane.INTERACTIVE, 100, "b")], "new", 0.2 + 1.0),
        ([(Lane.BULK, 10, str(i)) for i in range(50)], "new", 5.0),  # many clients make a queue, too
    ],
)
def test_a_client_waits_for_its_own_requests_and_its_share(
    waiting: list[tuple[Lane, int, str]], client: str, wait: float
) -> None:
    """At 100 tokens a second, until a text of 20 tokens has its turn."""
    costs, caller = [20] * 5, Caller(client)
    desk(*waiting, seconds=wait + 0.01, rate=50).check(Lane.BULK, costs, caller, NOW)
    with pytest.raises(QueueFull) as refused:
        desk(*waiting, seconds=wait - 0.05, rate=50).check(Lane.BULK, costs, caller, NOW)
    assert refused.value.retry_after == pytest.approx(0.05)


def test_what_the_other_lane_has_of_the_device_counts() -> None:
    few = desk((Lane.INTERACTIVE, 100), (Lane.BULK, 100), seconds=1.2, rate=50)  # four of five batches: 1.25 s
    with pytest.raises(QueueFull):
        few.check(Lane.INTERACTIVE, [20], ANYBODY, NOW)
    desk((Lane.INTERACTIVE, 100), seconds=1.2, rate=50).check(Lane.INTERACTIVE, [20], ANYBODY, NOW)


@pytest.mark.parametrize(("time_left", "hopeless"), [(1.5, False), (1.0, True)])
def test_a_deadline_that_cannot_be_kept_is_refused_before_any_work(time_left: float, hopeless: bool) -> None:
    admission = desk((Lane.BULK, 400), rate=100)
    caller = Caller(deadline=NOW + time_left)  # ready after 2.5 s by an estimate
    if not hopeless:
        admission.check(Lane.BULK, [100], caller, NOW)
        return
    with pytest.raises(DeadlineExceeded) as refused:
        admission.check(Lane.BULK, [100], caller, NOW)
    assert refused.value.retry_after == pytest.approx(2.0)


def test_the_drain_rate_is_measured() -> None:
    admission = desk()
    guess = admission.drain_rate
    admission.measure(1000, 2.0)
    assert admission.drain_rate == 1000 != guess
    admission.measure(1000, 1.0)
    assert 1000 < admission.drain_rate < 1200


def test_a_batch_that_takes_no_time_by_the_clock_is_very_fast() -> None:
    admission = desk((Lane.BULK, 500), seconds=0.001)
    admission.measure(100, 0.0)
    admission.check(Lane.BULK, [10], ANYBODY, NOW)


def test_slow_batches_count_for_as_long_as_they_take() -> None:
    """Batches of 100 tokens in 0.1 s and in 1 s by turns: two workers do 364 tokens a second, not 1100."""
    admission = desk()
    rates = []
    for seconds in [0.1, 1.0] * 20:
        admission.measure(100, seconds)
        rates.append(admission.drain_rate)
    assert sum(rates[-10:]) / 10 == pytest.approx(400 / 1.1, rel=0.1)
