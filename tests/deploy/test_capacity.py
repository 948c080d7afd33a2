"""docs/capacity.md is what `python -m tests.capacity` prints."""

from pathlib import Path

from tests.capacity import LENGTHS, PRICES, bound_gpu, measured_core, tables

PAGE = (Path(__file__).parents[2] / "docs" / "capacity.md").read_text(encoding="utf-8")


def test_the_page_has_the_tables() -> None:
    assert [table for table in tables(PRICES) if table not in PAGE] == []


def test_longer_texts_cost_more_and_their_tokens_less() -> None:
    for device in (measured_core("bfloat16", 1), bound_gpu("H200", 1, 0.6)):
        seconds = [device.seconds(n) for n in LENGTHS]
        dollars = [device.dollars(n) for n in LENGTHS]
        assert seconds == sorted(seconds)
        assert dollars == sorted(dollars, reverse=True)
