from __future__ import annotations

import itertools
import operator
from collections import Counter
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mhc_compile import ops
from mhc_compile.config import Options, resolve
from mhc_compile.convert import Conversion, convert
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.passes import PassContext
from mhc_compile.passes.recompute import PLAN_KEY, RecomputeResult, inductor_settings, plan_key, recompute
from mhc_compile.report import CompileReport
from tests.passes.models import WIDTH, Block, Stack, conversions, tokens

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
            compiled = aot_autograd(
                fw_compiler=lambda g, _: make_boxed_func(self._see("forward", g)),
                bw_compiler=lambda g, _: make_boxed_func(self._see("backward", g)),
                partition_fn=min_cut_rematerialization_partition,
            )(self.conversion.gm, self.conversion.inputs)
            return lambda *args: compiled(*args, *self.conversion.parameters.values)

        torch._dynamo.reset()
        self.graphs: dict[str, fx.Graph] = {}
        torch.manual_seed(11)
        self.output = torch.compile(module, backend=backend)(tokens())
        hyper = self.conversion.parameters.values
        wanted = [*module.parameters(), *(p for p in hyper if isinstance(p, nn.Parameter))]
        loss = self.output.square().mean() + (self.output * 0.3).sum()
        self.gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        self.result = plan_of(self.conversion.report)

    def _see(self, name: str, graph: fx.GraphModule) -> Any:
        self.graphs[name] = graph.graph
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


# ------------------------------------------------------------------------------------------------ what is saved
@pytest.mark.parametrize(
    ("layers", "wanted"),
    [
        (2, "memory"),
        (2, "bytes"),
        (12, "memory"),
        pytest.param(12, "bytes", marks=pytest.mark.slow),
        pytest.param(36, "memory", marks=pytest.mark.slow),
        pytest.param(36, "bytes", marks=pytest.mark.slow),
    ],
)
def test_saved_tensors_are_those_of_the_plan(layers: int, wanted: str) -> None:
    sites = 2 * layers
    off = Run(model(layers))
    run = Run(model(layers), recompute="memory" if wanted == "memory" else (sites // 3 + 1) * STATE)
    rows = run.result.rows
    assert len(rows) == sites
    kept = kept_of(run.result)
    inputs = [row.index for row in rows if row.branch_input == "kept"]
    replayed = sites - len(inputs)
    assert 0 < len(kept) < sites - 1
    # Our ops: states at the boundaries, the four results of every site's coefficients, the inputs that are kept.
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept]
    assert run.saved_of(ops.expand.overload) == []
    assert run.saved_of(ops.pre.overload) == inputs
    coefficients = [
        n for n in run.saved if n.target is operator.getitem and n.args[0].target is ops.coefficients.overload
    ]
    assert len(coefficients) == 4 * sites
    # Everything else: as without recompute, but for the norms of replayed inputs (their means instead of their results
    # and reciprocal roots), and the value that is expanded.
    gone, new = off.kinds - run.kinds, run.kinds - off.kinds
    assert gone == Counter({f"rsqrt{[2, 5, 1]}": replayed, f"view{[10, WIDTH]}": replayed})
    assert new == Counter({f"mean{[2, 5, 1]}": replayed, f"view{[2, 5, WIDTH]}": 1})
    # The replay: each state that is not kept once, each input that is not kept once, no projection, no branch.
    assert run.count(ops.post.overload) == sites - 1 - len(kept)
    assert run.count(ops.pre.overload) == replayed
    assert run.count(ops.expand.overload) == 1
    assert run.count(ops.coefficients.overload) == run.count(ops.sinkhorn.overload) == 0
    for target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
        assert run.count(target) == off.count(target)
    same(off, run)


def test_replay_starts_when_its_block_does() -> None:
    """The states of one block are replayed after the backward of the block above it has begun, not all at once."""
    run = Run(model(6), recompute=4 * STATE)
    order = {node: index for index, node in enumerate(run.graphs["backward"].nodes)}
    posts = [order[node] for node in order if node.target is ops.post.overload]
    backwards = [order[node] for node in order if node.target is ops.post.backward_overload]
    assert len(kept_of(run.result)) >= 2
    assert min(posts) < backwards[len(backwards) // 2] < max(posts)


def test_off_and_graphs_without_gradients_are_left_alone() -> None:
    off = Run(model(1))
    assert off.result.changed == 0
    assert off.conversion.gm.meta[PLAN_KEY] == ""
    seen: list[Conversion] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(convert(gm, inputs, resolve({"recompute": "memory"}, None)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model(1), backend=backend)(tokens())
    result = plan_of(seen[0].report)
    assert result.changed == 0
    assert "no gradient" in result.notes[0]


# ------------------------------------------------------------------------------------------------ same bits
@pytest.mark.parametrize(
    ("variant", "norm"),
    [("mhc", nn.LayerNorm), ("mhc", nn.RMSNorm), ("single_pass", SpelledNorm), ("identity", SpelledNorm)],
)
def test_bits(variant: str, norm: type[nn.Module]) -> None:
    off = Run(model(3, norm), variant=variant, init="paper")
    run = Run(model(3, norm), variant=variant, init="paper", recompute="memory")
    assert run.result.changed > 0
    assert len(run.saved) <= len(off.saved)
    same(off, run)


def test_bits_with_a_learned_collapse_and_dropout() -> None:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + nn.functional.dropout(self.attn(x), 0.3)
            return x + nn.functional.dropout(self.mlp(x), 0.3)

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Stack([Dropping(norm=SpelledNorm) for _ in range(3)])

    off, run = Run(build(), collapse="learned"), Run(build(), collapse="learned", recompute=2 * STATE)
    assert run.result.rows[-1].output_bytes == 0  # the state that the head reads has no branch
    same(off, run)


def test_checkpoints_of_the_model_keep_their_branches_and_lose_the_streams() -> None:
    """Inside the user's checkpoints the branches are recomputed as asked; states and outputs follow the plan."""

    def body(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    plain, off = Run(model(4)), Run(model(4, body=body))
    run = Run(model(4, body=body), recompute=3 * STATE)
    kept = kept_of(run.result)
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept]
    assert len(kept) < 7
    assert run.count(ops.coefficients.overload) == 0
    assert off.count(ops.coefficients.overload) > 0  # without a plan the checkpoints run them again
    more = run.count(torch.ops.aten.addmm.default) + run.count(torch.ops.aten.mm.default)
    assert more > plain.count(torch.ops.aten.addmm.default) + plain.count(torch.ops.aten.mm.default)
    same(off, run)


def test_activation_memory_budget_leaves_the_plan_alone() -> None:
    import torch._functorch.config as functorch_config

    off = Run(model(3))
    with functorch_config.patch(activation_memory_budget=0.5):
        run = Run(model(3), recompute=3 * STATE)
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept_of(run.result)]
    same(off, run)


# ------------------------------------------------------------------------------------------------ the choice
def results(layers: int, *settings: dict[str, Any]) -> list[RecomputeResult]:
    """What the pass says about one model under several settings; nothing is compiled."""
    _, _, outcomes = conversions(model(layers), [tokens()], settings)
    assert all(isinstance(outcome, Conversion) for outcome in outcomes), outcomes
    return [plan_of(outcome.report) for outcome in outcomes]


def test_bytes_bound_what_is_kept() -> None:
    wanted = [1, STATE, 3 * STATE, 6 * STATE, 10**9]
    least, *bounded, free = results(4, *({"recompute": number} for number in wanted))
    assert "do not hold" in least.notes[0]
    assert kept_of(least) == []
    for number, result in zip(wanted[1:], bounded, strict=False):
        assert result.kept_bytes <= number
        assert len(kept_of(result)) == number // STATE - 1 + (number % STATE > STATE // 4)  # and what is expanded
        assert {row.branch_input for row in result.rows} == {"replayed"}
    assert free.changed == 0


def test_speed_replays_only_what_does_not_fit() -> None:
    free, least = results(4, {"recompute": "speed"}, {"recompute": "memory"})
    assert free.changed == 0
    assert "everything fits" in free.notes[0]
    middle = (least.peak + least.peak_without) // 2
    some, none = results(4, *({"recompute": "speed", "memory_budget": budget} for budget in (middle, 1)))
    assert least.peak <= some.peak <= middle
    assert 0 < some.replay_seconds <= least.replay_seconds
    assert none.peak == least.peak
    assert "no plan" in none.notes[0]


def test_no_replay_where_it_cannot_lower_the_peak() -> None:
    _, _, (outcome,) = conversions(model(1), [tokens(1, 1, 3)], [{"recompute": "memory"}])
    result = plan_of(outcome.report)
    assert result.changed == 0
    assert "elsewhere" in result.notes[0]
    assert result.peak == result.peak_without


def test_the_table_adds_up() -> None:
    (result,) = results(4, {"recompute": "memory"})
    kept = sum(row.state_bytes for row in result.rows if row.state == "kept")
    kept += sum(row.input_bytes for row in result.rows if row.branch_input == "kept")
    assert result.kept_bytes == kept + STATE // 4
    assert result.kept_without == sum(row.state_bytes + row.input_bytes for row in result.rows)
    assert result.peak < result.peak_without
    assert {row.coefficient_bytes for row in result.rows} == {2 * 5 * (4 + 4 + 16 + 25) * 4}
    assert {row.output_bytes for row in result.rows} == {STATE // 4}
    assert all(":" in row.where for row in result.rows)


def test_the_report_has_a_line_a_block() -> None:
    _, _, (outcome, off) = conversions(model(4), [tokens()], [{"recompute": 3 * STATE}, {}])
    text = str(outcome.report)
    result = plan_of(outcome.report)
    assert f"predicted peak {result.peak / 1024:.1f} KiB" in text
    starts = [0, *kept_of(result)]
    for first, after in itertools.pairwise([*starts, 8]):
        label = f"0.{first}" if after == first + 1 else f"0.{first}..{after - 1}"
        assert any(line.startswith(f"{label} ") and "KiB" in line for line in text.splitlines()), text
    assert '"replay_seconds"' in outcome.report.to_json()
    assert "predicted peak" not in str(off.report)


# ------------------------------------------------------------------------------------------------ the key
def test_plans_have_their_own_keys() -> None:
    settings = [{"recompute": number * STATE} for number in (2, 4, 2)]
    _, _, outcomes = conversions(model(3), [tokens()], settings)
    keys = [outcome.gm.meta[PLAN_KEY] for outcome in outcomes]
    assert keys[0] == keys[2] != keys[1]
    identities = {str(LowerPass(Options(), LoweringLog(), key).uuid()) for key in keys}
    assert len(identities) == 2


def test_buffers_are_not_held_for_reuse_where_there_is_a_plan() -> None:
    _, _, (off, on) = conversions(model(3), [tokens()], [{}, {"recompute": 2 * STATE}])
    assert inductor_settings(off.gm, Options()) == {}
    assert inductor_settings(on.gm, Options(recompute=2 * STATE)) == {"allow_buffer_reuse": False}
    assert hasattr(torch._inductor.config, "allow_buffer_reuse")


def test_running_it_again_changes_nothing() -> None:
    _, _, (outcome,) = conversions(model(3), [tokens()], [{"recompute": "memory"}])
    before = plan_key(outcome.gm)
    ctx = PassContext(Options(recompute="memory"), is_parameter=lambda node: "parameters" in node.name)
    assert recompute(outcome.gm, ctx).changed == plan_of(outcome.report).changed
    assert plan_key(outcome.gm) == before


def test_ops_called_by_hand_are_planned_too() -> None:
    """The pass knows our ops, not who put them into the graph."""

    class ByHand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(6)])
            self.gates = nn.Parameter(torch.full((2, 5, 4), 0.25))

        def forward(self, x: Tensor) -> Tensor:
            streams = x.unsqueeze(-2).repeat(1, 1, 4, 1)
            for layer in self.layers:
                y = layer(torch.ops.mhc.pre.default(streams, self.gates))
                streams = torch.ops.mhc.post.default(streams, y, self.gates, None, False)
            return torch.ops.mhc.collapse.default(streams, "mean")

    graphs: list[fx.GraphModule] = []
    module = ByHand()
    torch.compile(module, backend=lambda gm, _: graphs.append(gm) or gm.forward)(tokens(2, 5, WIDTH))
    result = recompute(graphs[0], PassContext(Options(recompute=2 * STATE)))
    assert len(result.rows) == 6
    assert result.rows[0].state == "kept"  # not expanded by our op: its source is unknown
    tagged = {node.meta.get("recompute") for node in graphs[0].graph.nodes if node.target is ops.post.overload}
    assert {CheckpointPolicy.MUST_RECOMPUTE} < tagged | {None}


@pytest.mark.slow
def test_bits_with_inductor() -> None:
    import mhc_compile.backend as backend

    def step(module: nn.Module, **options: Any) -> list[Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(module, backend=backend.mhc, options={"init": "paper", **options})
        torch.manual_seed(5)
        output = compiled(tokens())
        output.square().mean().backward()
        return [output.detach(), *(p.grad for p in module.parameters())]

    off, run = step(model(2)), step(model(2), recompute=2 * STATE)
    assert plan_of(backend.reports[-1]).changed > 0
    assert len(off) == len(run)
    for one, other in zip(off, run, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_bits_of_a_native_model() -> None:
    """Hyper-connections that the model brought along, raised and then planned like any others."""
    pytest.importorskip("transformers")
    import mhc_compile.backend as backend
    from tests.spellings.families import deepseek_v4

    def step(**options: Any) -> list[Tensor | None]:
        torch._dynamo.reset()
        module = deepseek_v4(2)
        settings = {"compiler": "aot_eager", "rewrite": False, **options}
        compiled = torch.compile(module, backend=backend.mhc, options=settings)
        output = compiled(input_ids=torch.arange(16).reshape(2, 8), use_cache=False).last_hidden_state
        (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
        return [output.detach(), *(parameter.grad for parameter in module.parameters())]

    off, run = step(), step(recompute=3 * 2 * 8 * 4 * 32 * 4)
    result = plan_of(backend.reports[-1])
    assert [row.state for row in result.rows].count("kept") == 2
    assert len(result.rows) == 5  # four sites and the head
    for one, other in zip(off, run, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
