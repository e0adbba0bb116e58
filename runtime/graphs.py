"""CUDA graphs: what needs a GPU of the executor."""

from collections.abc import Callable

import torch

_AHEAD = 2


class Recorder:
    """Captures work on one device. All its graphs share a pool: one replays at a time."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Record ``work``, which has run before, without running it.

        What it allocates lives in the pool and is overwritten by other graphs' replays.
        """
        graph = torch.cuda.CUDAGraph()
        # other threads may use the device meanwhile
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            work()
        return graph


class Pace:
    """Keeps the host at most two steps ahead of the device.

    A loop that only launches would be over before the first step is: cancelling, a deadline and a
    progress bar would mean nothing. The device never waits: there is always a step in its queue.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events = [torch.cuda.Event(blocking=True) for _ in range(_AHEAD)]

    def keep(self) -> None:
        """Call after every step; waits for the one before the last."""
        oldest = self._events.pop(0)
        oldest.synchronize()  # returns at once if it was never recorded
        oldest.record(torch.cuda.current_stream(self._device))
        self._events.append(oldest)
