"""CUDA graphs: a forward recorded once, launched as a whole from then on."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_RECORDING = threading.Lock()
"""CUDA records one graph at a time in a process."""

Replay = Callable[[], None]
Record = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""A forward that reads and writes in place -> what runs it again, and where its result then is."""


def cuda_recorder(device: torch.device) -> Record:
    """Records CUDA graphs, whose memory they share: they never run at the same time."""
    pools: list[Any] = []
    # One for all: memory is shared, and libraries keep their workspaces, by stream.
    streams: list[torch.cuda.Stream] = []

    def record(run: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        # The outer stream comes back even from a recording that fails, which leaves its own behind.
        with _RECORDING, torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            if not streams:
                streams.append(torch.cuda.Stream())  # type: ignore[no-untyped-call]
            stream = streams[0]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # what libraries set up at a first use cannot be recorded
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = pools[0] if pools else None
            # Other threads, of other devices, may go on as they like.
            with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
                result = run()
            pools[:] = [graph.pool()]
            return graph.replay, result

    return record
