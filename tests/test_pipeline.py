"""``split_stages``: stages that together are the whole, each with a plan of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import mhc_compile
from mhc_compile import ops
from mhc_compile.backend import reports
from mhc_compile.errors import OptionError
from mhc_compile.passes.recompute import RecomputeResult
from mhc_compile.pipeline import split_stages
from mhc_compile.standalone import StandaloneGraph
from tests.passes.models import WIDTH, Block, Lambda, Mlp, Stack, tokens

STATE = 2 * 5 * 4 * WIDTH * 4
"""Bytes of a stream state."""


def whole(layers: int = 4, **options: Any) -> StandaloneGraph:
    torch.manual_seed(3)
    model = Stack([Block() for _ in range(layers)])
    return mhc_compile.standalone(model, tokens(), **{"init": "paper", **options})


def train(stages: list[Any], parameters: list[nn.Parameter]) -> list[Tensor]:
    """Output and gradients of one step through the stages."""
    value: tuple[Tensor, ...] = (tokens(),)
    for stage in stages:
        value = stage(*value)
    (output,) = value
    wave = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * wave).sum(), parameters)]


def posts(graph: fx.GraphModule) -> int:
    return sum(node.target is ops.post.overload for node in graph.graph.nodes)


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity"])
@pytest.mark.parametrize("sites", [[4], [3, 2]])
def test_the_stages_compute_what_the_whole_does(variant: str, sites: list[int]) -> None:
    graph = whole(variant=variant)
    stages = split_stages(graph, sites)
    assert [posts(stage) for stage in stages] == [*sites, 8 - sum(sites)]
    parameters = list(graph.parameters())
    assert sorted(map(id, (p for stage in stages for p in stage.parameters()))) == sorted(map(id, parameters))
    for one, other in zip(train([graph], parameters), train(stages, parameters), strict=True):
        assert torch.equal(one, other)


def test_each_stage_has_a_plan_of_its_own() -> None:
    """No block crosses the border, the state that comes in is a boundary, and the bits are those of the whole."""
    graph = whole()
    stages = split_stages(graph, [4])
    parameters = list(graph.parameters())
    plans: list[RecomputeResult] = []
    compiled = []
    for stage in stages:
        options = {"rewrite": False, "recompute": 2 * STATE, "compiler": "aot_eager"}
        compiled.append(torch.compile(stage, backend="mhc", options=options))
    before = list(reports)
    planned = train(compiled, parameters)
    for report in [report for report in reports if report not in before]:
        plans += [result for result in report.passes if isinstance(result, RecomputeResult)]
    first, second = plans
    assert [len(first.rows), len(second.rows)] == [4, 4]
    assert first.rows[0].state == "from source"  # the value that is expanded is kept
    assert second.rows[0].state == "kept"  # what comes from the stage before
    assert min(first.changed, second.changed) > 0
    for one, other in zip(train([graph], parameters), planned, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize(("compiler", "cases"), [("aot_eager", 3), ("inductor", 1)])
def test_stages_under_a_schedule_of_torch(compiler: str, cases: int, tmp_path: Path) -> None:
    """Two processes over gloo, GPipe and 1F1B, each stage with a plan: see tests/distributed/stages.py."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.stages", compiler, str(tmp_path / "store")]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count(": passed") == 2 * cases


def test_a_stage_is_saved_and_has_dynamic_sizes() -> None:
    model = Stack([Block() for _ in range(2)])
    graph = mhc_compile.standalone(model, tokens(), dynamic={0: 1})
    first, second = split_stages(graph, [1])
    assert first.dynamic == second.dynamic == {0: (1,)}
    buffer = io.BytesIO()
    torch.save(second, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    state = first(tokens(2, 9, 3))
    assert torch.equal(loaded(*state)[0], second(*state)[0])


def test_what_a_later_stage_needs_is_handed_through() -> None:
    """An input that only the last branch reads goes through the stages before it."""
    model = Lambda(
        lambda self, x, memory: (lambda y: y + self.b(y) * memory)((lambda y: y + self.c(y))(x + self.a(x))),
        a=Mlp(),
        b=Mlp(),
        c=Mlp(),
    )
    inputs = tokens(2, 5, WIDTH), tokens(2, 5, WIDTH, seed=1)
    graph = mhc_compile.standalone(model, *inputs)
    value: tuple[Tensor, ...] = inputs
    for stage in split_stages(graph, [1, 1]):
        value = stage(*value)
    assert torch.equal(value[0], graph(*inputs)[0])


@pytest.mark.parametrize("sites", [[], [0], [8], [4, 4], [3, -1]])
def test_an_empty_stage_is_refused(sites: list[int]) -> None:
    with pytest.raises(OptionError, match="does not leave a site"):
        split_stages(whole(), sites)


def test_a_border_within_a_region_is_refused() -> None:
    class Frozen(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x)
            with torch.no_grad():
                x = self.layers[0](x)
            return self.head(self.norm(self.layers[1](x)))

    graph = mhc_compile.standalone(Frozen([Block(), Block()]), tokens())
    with pytest.raises(OptionError, match="region of no_grad"):
        split_stages(graph, [1])
    assert len(split_stages(graph, [3])) == 2
