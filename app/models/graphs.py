"""Small batches on a GPU: the second stage recorded once a shape, and replayed with other contents.

A forward is some hundreds of kernels. With few texts launching them one by one takes far longer than computing them; a
CUDA graph launches all at once (docs.pytorch.org, notes/cuda: CUDA Graphs). It takes the same shapes and addresses
every time, so a batch is filled up to one of few shapes with rows that nobody looks at, and copied to where the
recorded one was. Attention reads where sequences begin on the device, and takes empty ones (as in pytorch/torchtitan
#4158): lengths are contents, too.

N texts, C context rows each, R rows of texts with the filler, T = N C + R; D hidden_size.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from app.domain import InputType, TokenizedText
from app.models.attention import Entered
from app.models.base import DeviceContext
from app.models.device import is_out_of_memory, pinned
from app.models.layout import mean_weights
from app.models.recording import Record, Replay

log = logging.getLogger(__name__)

MAX_TEXTS = 4
"""Larger batches compute for longer than they are launched."""
ROWS = 32
"""A text, on average, is filled up to a multiple of so many rows."""
LONGEST = 512
"""Tokens of a text, on average: beyond it a forward computes for longer than it is launched."""
TOLERANCE = 1e-3
"""Of the largest value: what the same kernels may differ by."""
AGAIN = 1000
"""So many batches of a shape are launched before it is recorded once more, if memory was lacking."""

Shape = tuple[int, int]
"""N, R"""


class Batch(NamedTuple):
    """What differs between batches of one shape, contexts aside. All but `shares` and the bounds are int64."""

    input_ids: Tensor
    """(R,)"""
    shares: Tensor
    """(N, R) float32: what each row counts in the mean of each text."""
    order: Tensor
    """(T,): rows of the contexts, one behind the other, and of the texts behind those -> each text's behind its
    context's, and the filler."""
    positions: Tensor
    """(T,)"""
    wanted_rows: Tensor
    """(R,): which of the ordered rows are the texts' and the filler's."""
    bounds: Tensor
    """(N + 2,) int32: where each sequence begins, the filler's too, which may be empty, and T."""
    wanted_bounds: Tensor
    """(N + 2,) int32: the same among the wanted rows."""


def batch_of(texts: Sequence[TokenizedText], skipped: Sequence[int], context_rows: int, rows: int) -> Batch:
    """`skipped`: how many of each text's tokens do not count in its mean. `rows`: R, at least the texts' tokens."""
    lengths = [len(text.input_ids) for text in texts]
    count, filler = len(texts), rows - sum(lengths)
    ids = [i for text in texts for i in text.input_ids] + [0] * filler
    order, positions, wanted, bounds, wanted_bounds = [], [], [], [0], [0]
    start = 0
    for i, length in enumerate(lengths):
        order += [torch.arange(context_rows) + i * context_rows, torch.arange(length) + count * context_rows + start]
        positions.append(torch.arange(context_rows + length))
        wanted.append(torch.arange(length) + bounds[-1] + context_rows)
        start += length
        bounds.append(bounds[-1] + context_rows + length)
        wanted_bounds.append(start)
    order.append(torch.arange(filler) + count * context_rows + start)
    positions.append(torch.arange(filler))
    wanted.append(torch.arange(filler) + bounds[-1])
    return Batch(
        input_ids=torch.tensor(ids),
        shares=mean_weights(pairwise(wanted_bounds), skipped, rows),
        order=torch.cat(order),
        positions=torch.cat(positions),
        wanted_rows=torch.cat(wanted),
        bounds=torch.tensor([*bounds, count * context_rows + rows], dtype=torch.int32),
        wanted_bounds=torch.tensor([*wanted_bounds, rows], dtype=torch.int32),
    )


class Room:
    """Where all recorded forwards read their contexts: a place for each text that a batch may have."""

    def __init__(self, context: DeviceContext) -> None:
        self._rows = len(context["x"])
        self._all = Entered(
            **{name: tensor.new_zeros(MAX_TEXTS * self._rows, *tensor.shape[1:]) for name, tensor in context.items()}
        )
        self._held: list[DeviceContext | None] = [None] * MAX_TEXTS

    def of(self, texts: int) -> Entered:
        """The first places."""
        return Entered(*(tensor[: texts * self._rows] for tensor in self._all))

    def fill(self, contexts: Sequence[DeviceContext]) -> None:
        """One a place. What is in its place stays: contexts never change, nothing else writes here, and it was copied
        on the stream that the next replay is launched on."""
        for place, context in enumerate(contexts):
            if self._held[place] is context:
                continue
            self._held[place] = None
            for name, tensor in self._all._asdict().items():
                tensor[place * self._rows : (place + 1) * self._rows].copy_(context[name])
            self._held[place] = context


@dataclass(frozen=True, slots=True)
class Recorded:
    """A forward of one shape. `batch` and `room` are where it reads."""

    batch: Batch
    room: Room
    replay: Replay
    result: Tensor

    def __call__(self, batch: Batch, contexts: Sequence[DeviceContext]) -> Tensor:
        _copy(batch, self.batch)
        self.room.fill(contexts)
        self.replay()
        return self.result.clone()


class RecordedForwards:
    """Of one model on one device: at most MAX_TEXTS * LONGEST / ROWS of them. Thread-safe."""

    def __init__(self, forward: Callable[[Batch, Entered], Tensor], record: Record, context_rows: int) -> None:
        """`forward`: contexts as they entered the first layer, (N C, …) -> (N, D). It may depend on nothing but the
        shapes and contents of what it is given, and on what never changes."""
        self._forward = forward
        self._record = record
        self._context_rows = context_rows
        self._lock = threading.Lock()
        self._recorded: dict[Shape, Recorded] = {}
        self._launches_left: dict[Shape, int] = {}
        """Batches of a shape to be launched before it is recorded; the first one always is."""
        self._room: Room | None = None
        self._works = True

    def __call__(
        self, texts: Sequence[TokenizedText], skipped: Sequence[int], contexts: Sequence[DeviceContext]
    ) -> Tensor | None:
        """(N, D), or None for a batch that is none of these: too large, or of a shape met for the first time."""
        shape = (len(texts), rows_of(texts))
        if not self._works or shape[0] > MAX_TEXTS or shape[1] > shape[0] * LONGEST:
            return None
        with self._lock, torch.inference_mode():
            left = self._launches_left.get(shape, 1)
            if left:
                self._launches_left[shape] = left - 1
                return None
            batch = batch_of(texts, skipped, self._context_rows, shape[1])
            if shape not in self._recorded and not self._record_shape(shape, batch, contexts):
                return None
            return self._recorded[shape](batch, contexts)

    def warm_up(self, context: DeviceContext, longest: int) -> None:
        """Records all forwards of one text of up to `longest` tokens: a single query never waits for a recording."""
        for rows in range(ROWS, min(longest + ROWS - 1, LONGEST) + 1, ROWS):
            text = TokenizedText((0,) * rows, InputType.NONE)
            for _ in range(2):  # the first time a shape is only noted
                self((text,), (0,), (context,))

    def _record_shape(self, shape: Shape, batch: Batch, contexts: Sequence[DeviceContext]) -> bool:
        """Whether it could be recorded. If one cannot be, or gives something else than when it is launched, none
        is from now on; a lack of memory may pass."""
        try:
            room = self._room = self._room or Room(contexts[0])
            own = room.of(len(contexts))
            copied = Batch(*(torch.empty_like(tensor, device=own.x.device) for tensor in batch))
            _copy(batch, copied)
            room.fill(contexts)
            recorded = Recorded(copied, room, *self._record(lambda: self._forward(copied, own)))
            # Also with the shortest texts of this shape: lengths that were recorded, instead of read, would show.
            for probe in (batch, self._shortest(batch)):
                replayed = recorded(probe, contexts)
                launched = self._forward(copied, own)
                if not launched.isfinite().all():
                    return False  # says nothing about recording: the next batch will
                difference = float((replayed - launched).abs().max() / launched.abs().max())
                if not difference <= TOLERANCE:
                    return self._give_up(f"recorded forwards give other vectors, by {difference:.1e}")
        except (RuntimeError, NotImplementedError) as error:
            if is_out_of_memory(error):
                log.warning("no memory to record a forward of %d rows, it is launched: %s", len(batch.order), error)
                self._launches_left[shape] = AGAIN
                return False
            return self._give_up(f"forwards cannot be recorded: {error}")
        self._recorded[shape] = recorded
        return True

    def _shortest(self, batch: Batch) -> Batch:
        count, rows = batch.shares.shape
        text = TokenizedText((0,) * (rows // count - ROWS + 1), InputType.NONE)
        return batch_of([text] * count, [0] * count, self._context_rows, rows)

    def _give_up(self, reason: str) -> bool:
        """False, for good."""
        log.warning("all forwards are launched one by one from now on: %s", reason)
        self._works = False
        self._recorded.clear()
        return False


def rows_of(texts: Sequence[TokenizedText]) -> int:
    """R of these texts: few different ones for each number of texts."""
    step = ROWS * len(texts)
    return -(-sum(len(text.input_ids) for text in texts) // step) * step


def _copy(batch: Batch, to: Batch) -> None:
    for there, here in zip(to, batch, strict=True):
        there.copy_(pinned(here, there.device), non_blocking=True)
