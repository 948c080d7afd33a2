"""What callers may hold of memory together: nobody takes what others need, and nothing is lost on the way back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.budget import Budget, Share
from app.errors import BodiesFull, RequestTooLarge


def share(budget: Budget, *, key: str | None = None, address: str = "10.0.0.1", port: int = 1) -> Share:
    return Share(budget, {"state": {} if key is None else {"key_name": key}, "client": (address, port)})


def test_one_caller_gets_half_however_many_requests_it_sends() -> None:
    budget = Budget(100)
    shares = [share(budget, key="a", address=f"10.0.0.{i}") for i in range(6)]
    for each in shares[:5]:
        each.hold(10)
    with pytest.raises(BodiesFull):
        shares[5].hold(1)
    other = share(budget, key="b")
    other.hold(25)
    shares[0].release()
    with pytest.raises(BodiesFull):
        shares[5].hold(1)
    other.release()
    shares[5].hold(1)


def test_nor_by_asking_for_it_in_few_large_pieces() -> None:
    budget = Budget(100)
    share(budget, key="a").hold(30)
    with pytest.raises(BodiesFull):
        share(budget, key="a").hold(30)
    share(budget, key="a").hold(20)


def test_who_holds_nothing_is_forgotten() -> None:
    budget = Budget(100)
    for i in range(5):
        each = share(budget, address=f"10.0.0.{i}")
        each.hold(10)
        each.release()
    assert not budget._of


def test_where_there_are_no_keys_an_address_is_a_caller() -> None:
    budget = Budget(100)
    share(budget, port=1).hold(50)
    with pytest.raises(BodiesFull):
        share(budget, port=2).hold(1)
    share(budget, address="10.0.0.2").hold(25)


def test_what_nobody_can_ever_have_is_said_to_be_too_large() -> None:
    with pytest.raises(RequestTooLarge):
        share(Budget(100)).hold(51)


def test_a_request_holds_the_most_that_it_had() -> None:
    """What comes and goes in a long upload is asked for once, and not refused in its middle."""
    budget = Budget(100)
    long = share(budget, key="a")
    long.hold(40)
    long.hold(1)
    share(budget, key="b").hold(30)
    long.hold(40)
    with pytest.raises(BodiesFull):
        long.hold(41)


holds = st.lists(st.tuples(st.integers(0, 9), st.sampled_from("abcd"), st.integers(0, 60)), max_size=60)


@given(holds)
def test_room_is_left_for_whoever_comes_next(steps: list[tuple[int, str, int]]) -> None:
    """Whatever four callers do with ten requests each: a fifth finds a sixteenth of half, and all comes back."""
    budget = Budget(3200)
    shares = {(number, key): share(budget, key=key) for number in range(10) for key in "abcd"}
    for number, key, tenth in steps:
        try:
            shares[number, key].hold(10 * tenth)
        except BodiesFull:
            shares[number, key].release()
    newcomer = share(budget, key="e")
    newcomer.hold(100)
    for each in (newcomer, *shares.values()):
        each.release()
    share(budget, key="a").hold(1600)
