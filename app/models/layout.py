"""Sequences of any lengths packed one behind the other: rows (T, D), and where each sequence lies. None is padded to
the longest; a few rows of filler may keep the number of shapes small (kernels.py, `row_multiple`).

Linears and norms see the rows alone; attention goes segment by segment.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from app.models.device import to_device


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` sequences of equal `length` from row `start` on. Of each, the last `wanted` rows are wanted; these are
    rows `wanted_start` and on of what the last layer computes. The last `filler` of them are computed like the
    others, and nothing sees them."""

    start: int
    count: int
    length: int
    wanted: int
    wanted_start: int
    filler: int = 0

    @property
    def texts(self) -> Iterator[tuple[int, int]]:
        """Where each sequence's wanted rows begin among all wanted ones, and end but for the filler."""
        for i in range(self.count):
            start = self.wanted_start + i * self.wanted
            yield start, start + self.wanted - self.filler


@dataclass(frozen=True, slots=True)
class Layout:
    """positions (T,): each row's place in its sequence, below `longest`. wanted_rows: None where all are.

    bounds (N + 1,) int32: where each of N sequences begins, and T; wanted_bounds: the same among the wanted rows.
    """

    segments: tuple[Segment, ...]
    positions: Tensor
    wanted_rows: Tensor | None
    longest: int
    bounds: Tensor
    wanted_bounds: Tensor

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, prefix: int = 0, multiple: int = 1) -> "Layout":
        """Sequences of `prefix` rows nobody asks for, and `lengths[i]` wanted ones behind them, each filled up to a
        `multiple` of rows."""
        segments: list[Segment] = []
        start = wanted_start = 0
        for own, equal in groupby(lengths):
            filler = fill(prefix + own, multiple)
            length, wanted = prefix + own + filler, own + filler
            segment = Segment(start, len(list(equal)), length, wanted, wanted_start, filler)
            segments.append(segment)
            start += segment.count * length
            wanted_start += segment.count * wanted
        positions = torch.cat([torch.arange(s.length).repeat(s.count) for s in segments])
        asked = to_device((positions >= prefix).nonzero().flatten(), device) if prefix else None
        longest = max(segment.length for segment in segments)
        bounds = _bounds([s.length for s in segments for _ in range(s.count)], device)
        asked_bounds = _bounds([s.wanted for s in segments for _ in range(s.count)], device)
        return cls(tuple(segments), to_device(positions, device), asked, longest, bounds, asked_bounds)

    @property
    def texts(self) -> Iterator[tuple[int, int]]:
        """Where each sequence's wanted rows begin among all wanted ones, and end but for the filler."""
        return (text for segment in self.segments for text in segment.texts)

    @property
    def wanted_lengths(self) -> list[int]:
        """Of each sequence, filler and all."""
        return [segment.wanted for segment in self.segments for _ in range(segment.count)]

    @property
    def wanted(self) -> int:
        """Rows, T'."""
        return sum(self.wanted_lengths)

    def of_wanted(self) -> "Layout":
        """Positions of the wanted rows alone, for what looks at rows one by one."""
        positions = self.positions[self.wanted_rows]
        return Layout((), positions, None, self.longest, self.wanted_bounds, self.wanted_bounds)


def fill(length: int, multiple: int) -> int:
    """How many rows it lacks to be a multiple."""
    return -length % multiple


def means(hidden: Tensor, texts: Iterable[tuple[int, int]], skipped: Sequence[int]) -> Tensor:
    """(B, D) of hidden (T', D): the mean of each text's rows, less the first `skipped`; of none: zero. `texts`: where
    the rows of each begin and end.

    One sum a text, row after row: of other texts' rows nothing enters it, be it NaN, and nothing of size B T' is made.
    """
    own = [(start + skip, stop) for skip, (start, stop) in zip(skipped, texts, strict=True)]
    rows = torch.from_numpy(np.concatenate([np.arange(start, stop) for start, stop in own]))
    begins = torch.tensor([0, *accumulate(stop - start for start, stop in own)][:-1])
    return F.embedding_bag(to_device(rows, hidden.device), hidden, to_device(begins, hidden.device), mode="mean")


def mean_weights(texts: Iterable[tuple[int, int]], skipped: Sequence[int], rows: int) -> Tensor:
    """(B, rows) float32: times hidden states (rows, D), the mean of each text's rows, less the first `skipped`; of
    none: zero. `texts`: where the rows of each begin and end."""
    weights = torch.zeros(len(skipped), rows)
    for i, (skip, (start, stop)) in enumerate(zip(skipped, texts, strict=True)):
        weights[i, start + skip : stop] = 1.0 / max(1, stop - start - skip)
    return weights


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)


def packed(lengths: Sequence[int], max_rows: int) -> Iterator[list[int]]:
    """Indices of sequences for one forward each: similar lengths together, up to `max_rows` rows, or one sequence."""
    chunk: list[int] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if chunk and rows + lengths[index] > max_rows:
            yield chunk
            chunk, rows = [], 0
        chunk.append(index)
        rows += lengths[index]
    if chunk:
        yield chunk
