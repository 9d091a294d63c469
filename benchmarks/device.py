"""What the benchmarks of kernels share: the unit u and timing by device events. ``record`` writes their results."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch


def median_us(
    function: Callable[[], object], repeat: int = 30, warmup: int = 5, flush: bool = True, ahead: int = 2_000_000
) -> float:
    """Median microseconds of `function` on the device. With `flush` it is met as between the layers of a model: the L2
    is emptied before each run, and the host is `ahead` cycles (a millisecond) ahead of the device."""
    scratch = torch.empty(256 * 2**20 // 4, dtype=torch.int32, device="cuda") if flush else None
    for _ in range(warmup):
        function()
    torch.cuda.synchronize()
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(repeat)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(repeat)]
    for start, end in zip(starts, ends, strict=True):
        if scratch is not None:
            scratch.zero_()
            torch.cuda._sleep(ahead)
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) * 1000 for start, end in zip(starts, ends, strict=True))


def in_turns(
    calls: Mapping[str, Callable[[], object]],
    rounds: int = 12,
    each: int = 4,
    warmup: int = 1,
    flush: bool = False,
    ahead: int = 2_000_000,
) -> dict[str, list[float]]:
    """Median milliseconds of each call in each round, on the device: in a round every call runs `warmup` + `each` times
    in a row (`flush`, `ahead`: see `median_us`), and every other round goes backwards. A GPU that grows warm slows down
    by several percent: of two calls that are measured one after the other the first has the cooler device."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: -1 if number % 2 else 1]:
            microseconds = median_us(calls[name], repeat=each, warmup=warmup, flush=flush, ahead=ahead)
            found[name].append(microseconds / 1000)
    return found


def ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """`one` over `other`, round by round of `in_turns`, the least first."""
    return sorted(a / b for a, b in zip(one, other, strict=True))


def graphed(function: Callable[[], object]) -> Callable[[], object]:
    """`function` as a CUDA graph: what the device needs, without the host's part of the launches."""
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def repeatable(deterministic: bool = True) -> None:
    """Settings of a process that compares bits; before anything touches the device. Attention is flash attention,
    whatever was chosen by default: cuDNN's backward does not repeat itself."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # PyTorch's own default on a Hopper
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set through its module
    torch.backends.cuda.enable_cudnn_sdp(False)


def unit_us(tokens: int, width: int) -> float:
    """u: microseconds to move tokens x width bf16 elements once, from a large copy (bytes read plus bytes written)."""
    source = torch.randn(2**29, device="cuda", dtype=torch.float32).to(torch.bfloat16)
    target = torch.empty_like(source)
    seconds = median_us(lambda: target.copy_(source), repeat=20, flush=False) / 1e6
    bandwidth = 2 * source.numel() * 2 / seconds
    return tokens * width * 2 / bandwidth * 1e6
