"""Graphs that fork run on a stream of high priority, in order with whatever stream calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile import compat
from mhc_compile.scheduler import main_stream, schedule
from mhc_compile.scheduler.main_stream import PRIORITY, Raised, raise_forks
from mhc_compile.scheduler.schedule import ScheduleLog, using
from tests.scheduler.graphs import greedy_buffers
from tests.scheduler.test_schedule import table

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def add_one(inputs: list[Any]) -> list[Tensor]:
    given = inputs[0]
    inputs.clear()
    return [given + 1]


def test_what_forks_is_raised_and_nothing_else() -> None:
    assert raise_forks("buf0 = torch.ops.mhc_stream.fork.default([x])", add_one).run is add_one  # type: ignore[attr-defined]  # is a Raised
    assert raise_forks("buf0 = torch.ops.aten.mm.default(x, y)", add_one) is add_one


def test_on_a_cpu_it_runs_as_it_is() -> None:
    given: list[Any] = [torch.ones(2)]
    (result,) = Raised(add_one)(given)
    assert torch.equal(result, torch.full((2,), 2.0))
    assert not given, "the list is the caller's: what runs may empty it"


@pytest.mark.slow
def test_a_plan_is_raised_whether_it_is_compiled_or_comes_from_inductor_s_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    asked: list[str] = []

    def noted(source: str, run: main_stream.Run) -> main_stream.Run:
        asked.append(type(raise_forks(source, run)).__name__)
        return run

    def backend(gm: Any, inputs: Any) -> Any:
        with using(table(), least_gain=0.0):
            settings = schedule.schedule_patches({}, ScheduleLog(), schedule.no_split, "test")
        return compat.inductor_compile(gm, inputs, settings, noted)

    x, w = torch.randn(32, 32), torch.randn(32, 32, requires_grad=True)
    results = []
    monkeypatch.setenv("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
    with fresh_cache():
        for _ in range(2):
            torch._dynamo.reset()
            results.append(torch.compile(lambda x, w: greedy_buffers(x, w), backend=backend)(x, w.detach()))
    assert asked == ["Raised", "Raised"]
    assert counters["inductor"]["fxgraph_cache_hit"] >= 1
    assert torch.equal(*results)


@pytest.mark.gpu
@needs_cuda
def test_a_caller_has_one_stream_and_one_of_high_priority_is_left_alone() -> None:
    caller, other, high = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=-2)
    assert main_stream.main_stream(high) is high
    mine = main_stream.main_stream(caller)
    assert mine.priority == PRIORITY
    assert main_stream.main_stream(caller) is mine
    assert main_stream.main_stream(other) is not mine


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("late", ["caller", "graph"])
def test_both_ways_round_one_waits_for_the_other(late: str) -> None:
    """The caller's stream or the graph's is asleep when the other comes by; memory is let go and taken again."""
    caller = torch.cuda.Stream()
    cycles = 20_000_000

    def run(inputs: list[Any]) -> list[Tensor]:
        assert torch.cuda.current_stream().priority == PRIORITY
        given = inputs.pop()
        if late == "graph":
            torch.cuda._sleep(cycles)
        return [given + 1]

    raised = Raised(run)
    with torch.cuda.stream(caller):
        value = torch.zeros(2**20, device="cuda")
        for _ in range(5):
            if late == "caller":
                torch.cuda._sleep(cycles)
            value = value * 2
            given, value = [value], torch.empty(0)
            (value,) = raised(given)
            assert torch.cuda.current_stream() == caller
    caller.synchronize()
    assert bool((value == 31).all())


@pytest.mark.gpu
@needs_cuda
def test_an_error_leaves_the_caller_on_its_stream() -> None:
    def run(inputs: list[Any]) -> None:
        raise ValueError("no")

    caller = torch.cuda.Stream()
    with torch.cuda.stream(caller):
        with pytest.raises(ValueError, match="no"):
            Raised(run)([torch.ones(1, device="cuda")])
        assert torch.cuda.current_stream() == caller


@pytest.mark.gpu
@needs_cuda
def test_in_a_cuda_graph() -> None:
    """The stream that captures is the user's to choose."""
    seen: list[int] = []

    def run(inputs: list[Any]) -> list[Tensor]:
        seen.append(torch.cuda.current_stream().priority)
        return [inputs[0] * 2]

    raised, x = Raised(run), torch.ones(8, device="cuda")
    raised([x])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out,) = raised([x + 1])
        out = out + 1
    for value in (3.0, 5.0):
        x.fill_(value)
        graph.replay()
        assert bool((out == 2 * (value + 1) + 1).all())
    assert seen == [PRIORITY, 0]


@pytest.mark.gpu
@needs_cuda
def test_a_model_with_a_plan_trains_as_without_one() -> None:
    """Forward and backward through inductor with side work, called on a stream without priority: the same bits."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return greedy_buffers(x, self.w.detach()) @ self.w

    def backend(gm: Any, inputs: Any) -> Any:
        with using(table(), least_gain=0.0):
            settings = schedule.schedule_patches({}, ScheduleLog(), schedule.no_split, "test")
        return compat.inductor_compile(gm, inputs, settings, raise_forks)

    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)).cuda()
    found = []
    for how in ("inductor", backend):
        torch._dynamo.reset()
        model = Model().cuda()
        call: Any = torch.compile(model, backend=how)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(4):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
        found.append(model.w.detach().clone())
    assert torch.equal(*found)
