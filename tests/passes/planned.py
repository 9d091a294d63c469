"""What the tests of recompute share: a model whose norms are spelled out, one training step, and the graphs of it."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx, nn

from mhc_compile.config import resolve
from mhc_compile.convert import Conversion, convert
from mhc_compile.lowering.logits_alone import leave, merge
from mhc_compile.passes.recompute import RecomputeResult
from mhc_compile.report import CompileReport
from tests.passes.models import WIDTH, Block, Stack, tokens

STATE = 2 * 5 * 4 * WIDTH * 4
"""Bytes of a stream state of these models."""


class SpelledNorm(nn.Module):
    """RMSNorm as Hugging Face writes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(dtype)


def model(layers: int, norm: type[nn.Module] = SpelledNorm, body: Any = None) -> nn.Module:
    torch.manual_seed(3)
    return Stack([Block(norm=norm) for _ in range(layers)], body)


def plan_of(report: CompileReport) -> RecomputeResult:
    """What the pass says."""
    return next(result for result in report.passes if isinstance(result, RecomputeResult))


class Run:
    """One training step through AOTAutograd's min-cut partitioner, and the two graphs it made."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
            self.conversion: Conversion = convert(gm, inputs, resolve(options, None))

            def partition(joint: fx.GraphModule, *args: Any, **settings: Any) -> Any:
                self.left = leave(joint.graph)  # as inductor does at its joint seam
                return min_cut_rematerialization_partition(joint, *args, **settings)

            compiled = aot_autograd(
                fw_compiler=lambda g, _: make_boxed_func(self._see("forward", g)),
                bw_compiler=lambda g, _: make_boxed_func(self._see("backward", g)),
                partition_fn=partition,
            )(self.conversion.gm, self.conversion.inputs)
            return lambda *args: compiled(*args, *self.conversion.parameters.values)

        torch._dynamo.reset()
        self.graphs: dict[str, fx.Graph] = {}
        self.merged: dict[str, int] = {}
        torch.manual_seed(11)
        self.output = torch.compile(module, backend=backend)(tokens())
        hyper = self.conversion.parameters.values
        both = [*module.parameters(), *(p for p in hyper if isinstance(p, nn.Parameter))]
        wanted = [parameter for parameter in both if parameter.requires_grad]
        loss = self.output.square().mean() + (self.output * 0.3).sum()
        self.gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        self.result = plan_of(self.conversion.report)

    def _see(self, name: str, graph: fx.GraphModule) -> Any:
        self.graphs[name] = graph.graph
        self.merged[name] = merge(graph.graph)
        graph.recompile()
        return graph.forward

    def count(self, target: Any) -> int:
        """Nodes of the backward graph that call `target`."""
        return sum(node.target is target for node in self.graphs["backward"].nodes)

    def made(self, target: Any) -> list[fx.Node]:
        return [node for node in self.graphs["forward"].nodes if node.target is target]

    @property
    def saved(self) -> list[fx.Node]:
        """What the forward graph hands to the backward graph, inputs left out."""
        (output,) = self.graphs["forward"].find_nodes(op="output")
        return [node for node in output.args[0][1:] if node.op != "placeholder"]

    def saved_of(self, target: Any) -> list[int]:
        """Which of the nodes that call `target` are saved, by their order."""
        saved = set(self.saved)
        return [index for index, node in enumerate(self.made(target)) if node in saved]

    def saved_results_of(self, target: Any) -> list[tuple[int, int]]:
        """Which results of which nodes that call `target` are saved, by their order."""
        made = {node: index for index, node in enumerate(self.made(target))}
        return [(made[n.args[0]], n.args[1]) for n in self.saved if n.target is operator.getitem and n.args[0] in made]

    @property
    def kinds(self) -> Counter[str]:
        """Saved values that are not ours, by what made them."""
        names = Counter()
        for node in self.saved:
            source = node.args[0] if node.target is operator.getitem else node
            if getattr(source.target, "namespace", "") == "aten":
                names[f"{source.target.overloadpacket.__name__}{list(node.meta['val'].shape)}"] += 1
        return names


def same(a: Run, b: Run) -> None:
    """Outputs and gradients are the same bits."""
    assert torch.equal(a.output, b.output)
    assert len(a.gradients) == len(b.gradients)
    for one, other in zip(a.gradients, b.gradients, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


def kept_of(result: RecomputeResult) -> list[int]:
    return [row.index for row in result.rows if row.state == "kept"]
