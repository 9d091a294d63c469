"""What the host needs: without CUDA graphs a step is no faster than it is launched.

    launch   one kernel of a compiled training step, everything included that the host does for a step
    move     a fork and a join, and the call that is made in Python in place of inductor's own launch

Both differ by two between machines with the same GPU (91 and 550 us on one host of an H200, 52 and 250 us on
another), so they are measured with the pairs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .emit import FORK, JOIN


@dataclass(frozen=True)
class Host:
    """Seconds of the host. The defaults, for a table without a measurement, are the most that was seen."""

    launch: float = 100e-6
    move: float = 600e-6


LAYERS = 24
WIDTH = 64
LITTLE = '["aten.neg.default", [{"input": 0}], {}]'
"""A call that does next to nothing, as a fork takes it."""


def _seconds(call: Callable[[], object], times: int) -> float:
    """Median seconds until a call has returned, the device being asked for nothing but launches."""
    found = []
    for _ in range(times):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(found)


def measure(calls: Sequence[Callable[[], object]]) -> Host:
    """On the current CUDA device; a few seconds, for a small model is compiled.

    Args:
        calls: side tasks, each launched from Python.
    """
    longest = max((_seconds(call, 20) for call in calls), default=0.0)
    return Host(_launch(), _seconds(_fork_and_join(), 50) + longest)


def _launch() -> float:
    """Of a training step of small matmuls: one forward and two backward a layer."""
    with torch.device("cuda"):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
        x = torch.randn(WIDTH, WIDTH, requires_grad=True)
    compiled = torch.compile(model, backend="inductor")

    def step() -> None:
        model.zero_grad(set_to_none=True)
        compiled(x).sum().backward()

    for _ in range(3):
        step()
    return _seconds(step, 15) / (3 * LAYERS)


def _fork_and_join() -> Callable[[], object]:
    x = torch.ones(1, device="cuda")
    return lambda: JOIN(FORK([x], LITTLE, 0), [], LITTLE, 0)
