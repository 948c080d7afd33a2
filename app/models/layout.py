"""Sequences of any lengths packed one behind the other: rows (T, D), and where each sequence lies. No padding.

Linears and norms see the rows alone; attention goes segment by segment.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """`count` sequences of equal `length` from row `start` on. Of each, the last `wanted` rows are wanted; these are
    rows `wanted_start` and on of what the last layer computes."""

    start: int
    count: int
    length: int
    wanted: int
    wanted_start: int


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
    def of(cls, lengths: Sequence[int], device: torch.device, prefix: int = 0) -> "Layout":
        """Sequences of `prefix` rows nobody asks for, and `lengths[i]` wanted ones behind them."""
        segments: list[Segment] = []
        start = wanted_start = 0
        for own, equal in groupby(lengths):
            segment = Segment(start, len(list(equal)), prefix + own, own, wanted_start)
            segments.append(segment)
            start += segment.count * segment.length
            wanted_start += segment.count * own
        positions = torch.cat([torch.arange(s.length).repeat(s.count) for s in segments])
        wanted = (positions >= prefix).nonzero().flatten().to(device) if prefix else None
        longest = max(segment.length for segment in segments)
        bounds = _bounds([prefix + own for own in lengths], device)
        return cls(tuple(segments), positions.to(device), wanted, longest, bounds, _bounds(lengths, device))

    def of_wanted(self) -> "Layout":
        """Positions of the wanted rows alone, for what looks at rows one by one."""
        positions = self.positions[self.wanted_rows]
        return Layout((), positions, None, self.longest, self.wanted_bounds, self.wanted_bounds)


def _bounds(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device)


def packed(lengths: Sequence[int], prefix: int, max_rows: int) -> Iterator[list[int]]:
    """Indices of sequences for one forward each: similar lengths together, up to `max_rows` rows, or one sequence."""
    chunk: list[int] = []
    rows = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if chunk and rows + prefix + lengths[index] > max_rows:
            yield chunk
            chunk, rows = [], 0
        chunk.append(index)
        rows += prefix + lengths[index]
    if chunk:
        yield chunk
