"""Means over packed rows: of each text's own rows and nothing else."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.models.layout import Layout, mean_weights, means

CPU = torch.device("cpu")


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=9),
    st.sampled_from([1, 32]),
    st.integers(0, 9),
)
@settings(max_examples=100, derandomize=True, database=None)
def test_each_text_has_the_mean_of_its_rows(texts: list[tuple[int, int]], multiple: int, seed: int) -> None:
    """Tokens and how many of them do not count, perhaps all; with filler behind them, which may hold anything."""
    layout = Layout.of([n for n, _ in texts], CPU, prefix=3, multiple=multiple)
    skipped = [min(n, skip) for n, skip in texts]
    hidden = torch.randn(layout.wanted, 5, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        got = means(hidden, layout.texts, skipped)
    weighted = mean_weights(layout.texts, skipped, len(hidden)).double() @ hidden.double()
    torch.testing.assert_close(got.double(), weighted, rtol=0, atol=1e-6)
    for row, skip, (start, stop) in zip(got, skipped, layout.texts, strict=True):
        alone = means(hidden[start:stop].clone(), [(0, stop - start)], [skip])
        assert torch.equal(row, alone[0]), "its neighbours change nothing"


def test_what_is_not_finite_stays_with_its_text() -> None:
    hidden = torch.ones(9, 4)
    hidden[3] = torch.nan
    got = means(hidden, [(0, 3), (3, 6), (6, 9)], [0, 0, 1])
    assert got.isnan().all(dim=1).tolist() == [False, True, False]
    assert torch.equal(means(hidden, [(3, 5)], [2]), torch.zeros(1, 4)), "of no row: zero"
