"""The main path on a stream of high priority: where a graph that forks runs, whatever stream its caller is on.

CUDA's default stream has the least priority there is, and so has the side stream: without this a kernel beside the main
path would get its share of the multiprocessors like one on it. The graph waits for what its caller's stream was given
before, and that stream waits for the graph. Not while a CUDA graph is captured: there a kernel keeps the priority of
the stream that it was captured on, which is the user's to choose, and of a stream that goes round its own work by
another one the graph keeps both ways, each an edge that costs a microsecond or two in every replay (a step of 2.06 ms
took 0.9 % longer on an H200).

The caching allocator gives out memory by stream. What a graph allocates comes from its main stream's pool, and is used
by the caller and let go. It is given out again within a later graph only, which begins by waiting for the caller: so
there is one main stream for each stream that calls, and nobody else allocates on it. What the graph lets go of its
caller's memory (inputs of a backward) is given out again behind the graph, for which the caller has waited then.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PRIORITY = -1
"""Of the main stream: above 0, which is the least and the side stream's."""

Run = Callable[[list[Any]], Any]
"""What runs a compiled graph: a list of inputs, which it may empty -> results."""

_streams: dict[tuple[int, int], Any] = {}


def main_stream(caller: Any) -> Any:
    """The stream of high priority for the graphs that a stream calls: that one if it has a high priority, else one of
    its own (of torch's pool of 32)."""
    if caller.priority < 0:
        return caller
    key = (caller.device_index, caller.cuda_stream)
    if key not in _streams:
        _streams[key] = torch.cuda.Stream(caller.device_index, priority=PRIORITY)
    return _streams[key]


class Raised:
    """A compiled graph that runs on the main stream of its caller."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, inputs: list[Any]) -> Any:
        """Run it; on a CPU, and within a capture, as it is. If it raises, the caller's stream still waits for what had
        been launched."""
        device = next((one.device for one in inputs if isinstance(one, Tensor) and one.is_cuda), None)
        if device is None or torch.cuda.is_current_stream_capturing():
            return self.run(inputs)
        caller = torch.cuda.current_stream(device)
        main = main_stream(caller)
        if main is caller:
            return self.run(inputs)
        main.wait_stream(caller)
        try:
            with torch.cuda.stream(main):
                return self.run(inputs)
        finally:
            caller.wait_stream(main)


def raise_forks(source: str, run: Run) -> Run:
    """What runs a graph, raised if inductor's code of it forks (the code says so also where it comes from a cache)."""
    return Raised(run) if "mhc_stream.fork" in source else run
