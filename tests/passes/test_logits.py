from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch._functorch.config
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mhc_compile import ops
from mhc_compile.config import Options
from mhc_compile.cost import CPU, Device
from mhc_compile.passes import logits
from mhc_compile.passes.activations import Live
from mhc_compile.passes.boundaries import Chain, Site
from mhc_compile.passes.logits import HALF_STEP, Logits, compare, made_again, total
from mhc_compile.passes.recompute import PLAN_KEY, RecomputeResult
from mhc_compile.passes.states import State, find_states
from tests.passes.models import Block, Stack, conversions, tokens
from tests.passes.planned import STATE, Run, SpelledNorm, kept_of, model, plan_of, same

GPU = Device("fast", 1e12, {"bfloat16": 1e15, "float32": 1e14}, 1e-6)
TOKENS = 2 * 5
NUMBERS = 4 + 4 + 16
"""pre, post and res of a token."""


def states_of(layers: int = 3, **options: object) -> list[State]:
    _, _, (outcome,) = conversions(Stack([Block() for _ in range(layers)]), [tokens()], [options])
    (states,) = find_states(outcome.gm.graph)
    return states


def logits_of(**options: object) -> Logits:
    states = states_of(**options)
    chain = Chain(tuple(Site(4 * 8 * TOKENS * 4, 0, 0, 2e-6, 0.0) for _ in states))
    return compare([node for state in states for node in state.coefficients], chain, GPU)


# ------------------------------------------------------------------------------------------------ what it comes to
def test_what_a_site_keeps_either_way() -> None:
    found = logits_of(sinkhorn_iters=3)
    assert found.kept == (24 + 25) * 4 * TOKENS
    assert found.alone == 25 * 4 * TOKENS
    assert found.saved == 6 * 24 * 4 * TOKENS
    assert found.seconds == pytest.approx(6 * (1e-6 + found.kept / 1e12 + 6 * HALF_STEP))
    assert found.instead == pytest.approx(2e-6 / (4 * 8 * TOKENS * 4) * found.saved)


def test_without_a_sinkhorn_there_is_only_the_launch() -> None:
    found = logits_of(variant="identity")
    assert found.kept == (8 + 9) * 4 * TOKENS
    assert found.seconds == pytest.approx(6 * (1e-6 + found.kept / 1e12))


def test_a_graph_without_coefficients_has_no_line() -> None:
    assert compare([], Chain(()), CPU) == Logits()
    assert Logits().line(1000) == ""


def test_the_line_says_what_is_kept_and_what_the_other_way_costs() -> None:
    few = Logits(2048, 1024, 2**20, 1e-3, 1e-5)
    assert "coefficients and logits kept, 2.0 KiB a site" in few.line(2**22)
    assert "1.00 MiB less (25.00% of the peak) for 1.000 ms" in few.line(2**22)
    assert "replayed states give the same bytes for 0.010 ms" in few.line(2**22)
    alone = Logits(2048, 1024, 2**20, 1e-3, 1e-5, chosen=True)
    assert alone.line(2**22).startswith("logits kept without the coefficients, 1.0 KiB a site at most instead of 2.0")
    assert "1.00 MiB less (25.00% of the peak) for 1.000 ms" in alone.line(2**22)
    assert Logits(2048, 1024, 2**20, 1e-3, 1e-5, refusal="few tokens").line(2**22).endswith("; few tokens")
    both = total([few, few])
    assert (both.kept, both.saved, both.seconds, both.chosen) == (2048, 2**21, 2e-3, False)
    assert total([few, alone]) == alone, "of several chains the line tells those that it was done in"


def every(states: list[State]) -> list[Any]:
    return [node for state in states for node in state.coefficients]


def test_a_chain_with_the_logits_alone() -> None:
    """Less is live, what is made again is counted with its site, and every plan takes the time of it."""
    states, asked = states_of(2), []

    def live(coefficients: Any) -> Live:
        asked.append(list(coefficients))
        return Live((1, 2, 3, 4), (5, 6, 7, 8), 9)

    sites = tuple(Site(1000, 100, 5000 + index, 2e-6, 1e-6, border=4000) for index in range(4))
    nodes = every(states)
    found = logits.logits_alone(states, Chain(sites, 10), GPU, nodes[1:], live)
    assert asked == [[49 * 4 * TOKENS, *[25 * 4 * TOKENS] * 3]]
    again = [0, *[NUMBERS * 4 * TOKENS] * 3]
    assert [(one.live, one.border, one.again, one.ahead) for one in found.sites] == [
        (index + 1, index + 5, again[index], 0) for index in range(4)
    ]
    assert (found.head, found.seconds) == (9, pytest.approx(logits.seconds_again(nodes[1:], GPU)))


def test_in_single_pass_a_boundary_has_what_the_site_before_makes() -> None:
    states = states_of(2, variant="single_pass")
    count = len(states)
    chain = Chain(tuple(Site(1000, 100, 5000, 2e-6, 1e-6) for _ in range(count)))
    found = logits.logits_alone(states, chain, GPU, every(states), lambda _: Live((0,) * count, (0,) * count, 0))
    assert [site.ahead > 0 for site in found.sites] == [False, *[True] * (count - 1)]


# ------------------------------------------------------------------------------------------------ where it is a choice
def refusal(states: list[State], options: Options) -> str:
    found, reason = made_again(states, options)
    assert found == ([] if reason else every(states))
    return reason


def test_only_where_the_same_code_makes_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    states = states_of()
    assert refusal(states, Options()) == ""
    assert "aot_eager" in refusal(states, Options(compiler="aot_eager"))
    assert "same bits twice" in refusal(states_of(variant="identity"), Options()), "traced, fused with its neighbours"
    assert "same bits twice" in refusal(states_of(sinkhorn_iters=3), Options())
    monkeypatch.setattr(logits, "runs_joint_passes", lambda: False)
    assert "joint passes" in refusal(states, Options())


def test_a_head_without_a_sinkhorn_is_kept_beside_sites_that_are_not() -> None:
    states = states_of(collapse="learned")
    found, reason = made_again(states, Options())
    assert found == every(states)[:-1]
    assert reason == ""
    run = forced("logits", lambda: Run(model(3), recompute=2 * STATE, collapse="learned"))
    assert run.left == 6
    assert run.saved_results_of(ops.coefficients.overload) == [*((site, 3) for site in range(6)), (6, 0), (6, 3)]


def test_few_tokens_take_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels here. From 65 tokens on, or with that fusion off, it is `activate` either way."""
    monkeypatch.setattr(logits.kernels, "platform_refusal", lambda device: "")
    states = states_of()
    assert "few tokens" in refusal(states, Options())
    assert refusal(states, Options(fuse=False)) == ""
    assert refusal(states, Options(lowering="native")) == "", "one call on a CPU"
    _, _, (outcome,) = conversions(model(2), [tokens(2, 33, 3)], [{}])
    (states,) = find_states(outcome.gm.graph)
    assert refusal(states, Options()) == ""


# ------------------------------------------------------------------------------------------------ the choice
def results(module: nn.Module, x: Tensor, *settings: dict[str, Any]) -> list[RecomputeResult]:
    _, _, outcomes = conversions(module, [x], settings)
    return [plan_of(outcome.report) for outcome in outcomes]


MANY = 2 * 500
"""Tokens: streams of 8 channels, so that K = 24 coefficients are as many numbers as three quarters of a state."""


def test_narrow_streams_choose_the_logits() -> None:
    (result,) = results(model(8), tokens(2, 500, 3), {"recompute": "memory"})
    assert result.logits.chosen
    assert {row.coefficient_bytes for row in result.rows} == {25 * 4 * MANY}
    assert result.replay_seconds > result.logits.seconds > 0
    assert result.peak < 0.99 * forced("coefficients", lambda: results(model(8), tokens(2, 500, 3), MEMORY)[0]).peak


MEMORY = {"recompute": "memory"}


def forced(form: str, make: Any) -> Any:
    """What is made where a plan has no choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logits, "FORMS", (form,))
        return make()


class Wide(nn.Module):
    """A layer of two sites of `width` channels whose branches keep much."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(nn.functional.layer_norm(x, x.shape[-1:]))))


@pytest.mark.parametrize(("width", "chosen"), [(64, True), (1024, False)])
def test_the_width_decides(width: int, chosen: bool) -> None:
    """24 numbers a token of some 300 or some 5000 that a site keeps."""
    stack = nn.Sequential(*(Wide(width) for _ in range(6)))
    (result,) = results(stack, torch.zeros(2, 500, width), MEMORY)
    assert result.changed > 0
    assert result.logits.chosen == chosen
    saved = result.logits.saved / result.peak
    assert (saved > 0.01) == chosen


def test_speed_chooses_them_for_what_nothing_else_reaches() -> None:
    module, x = model(8), tokens(2, 500, 3)
    kept = forced("coefficients", lambda: results(module, x, MEMORY)[0])
    budgets = [(kept.peak + kept.peak_without) // 2, kept.peak - 1]
    easy, hard = results(module, x, *({"recompute": "speed", "memory_budget": budget} for budget in budgets))
    assert easy.peak <= budgets[0]
    least = forced("coefficients", lambda: results(module, x, {"recompute": "speed", "memory_budget": budgets[0]})[0])
    assert easy.replay_seconds <= least.replay_seconds
    assert hard.logits.chosen
    assert hard.peak <= budgets[1]
    assert not hard.notes


def test_bytes_are_those_of_states() -> None:
    (result,) = results(model(8), tokens(2, 500, 3), {"recompute": 3 * STATE * 100})
    assert result.changed > 0
    assert not result.logits.chosen


def test_it_is_in_the_report() -> None:
    settings = [{"recompute": 2 * 4 * 8 * TOKENS * 4}, {}]
    _, _, (on, off) = conversions(Stack([Block() for _ in range(3)]), [tokens()], settings)
    assert "coefficients and logits kept, 1.9 KiB a site at most" in " ".join(str(on.report).split())
    assert "coefficients and logits kept" not in str(off.report)
    _, _, (alone, eager) = conversions(model(8), [tokens(2, 500, 3)], [MEMORY, {**MEMORY, "compiler": "aot_eager"}])
    text = " ".join(str(alone.report).split())
    assert "logits kept without the coefficients, 97.7 KiB a site at most instead of 191.4 KiB" in text
    said = next(found for found in json.loads(alone.report.to_json())["passes"] if found["name"] == "recompute")
    assert said["logits"]["chosen"] is True
    assert {row["coefficient_bytes"] for row in said["rows"]} == {25 * 4 * MANY}
    assert "no pass over the joint graph" in " ".join(str(eager.report).split())
    assert alone.gm.meta[PLAN_KEY] != eager.gm.meta[PLAN_KEY]


# ------------------------------------------------------------------------------------------------ what is saved
@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("folded", [False, True], ids=["spelled", "folded"])
def test_saved_tensors_are_those_of_the_plan(layers: int, folded: bool, request: pytest.FixtureRequest) -> None:
    """Of a site's coefficients the projection alone; in the backward one `activate` each, and no product with phi."""
    if folded:
        request.getfixturevalue("everywhere")
    sites, kind = 2 * layers, ops.pre_norm if folded else ops.pre
    off = Run(model(layers))
    both, alone = (forced(form, lambda: Run(model(layers), recompute=3 * STATE)) for form in logits.FORMS)
    assert (both.left, alone.left) == (0, sites)
    assert alone.merged == {"forward": sites, "backward": 0}
    assert both.saved_results_of(ops.coefficients.overload) == [(s, r) for s in range(sites) for r in range(4)]
    assert alone.saved_results_of(ops.coefficients.overload) == [(site, 3) for site in range(sites)]
    assert alone.count(ops.activate.overload) == sites
    assert alone.made(ops.activate.overload) == []
    for target in (ops.coefficients.overload, ops.sinkhorn.overload):
        assert alone.count(target) == 0
    for target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
        assert alone.count(target) == off.count(target)
    kept = kept_of(alone.result)
    assert alone.saved_of(ops.post.overload) == [index - 1 for index in kept]
    assert alone.count(ops.post.overload) == sites - 1 - len(kept)
    assert alone.count(kind.overload) == sites
    assert alone.result.changed == both.result.changed + sites - len(kept) + len(kept_of(both.result))
    same(off, both)
    same(off, alone)


def test_they_are_made_again_when_their_block_starts() -> None:
    """As the model of the peak has it: not before the backward of the block above is done, and each before its site."""
    run = forced("logits", lambda: Run(model(6), recompute=4 * STATE))
    order = list(run.graphs["backward"].nodes)
    backwards = [index for index, node in enumerate(order) if node.target is ops.post.backward_overload][::-1]
    sites = {node: site for site, node in enumerate(run.made(ops.coefficients.overload))}
    projections = {node.name: sites[node.args[0]] for node in run.saved if node.args and node.args[0] in sites}
    again = {projections[node.args[0].name]: index for index, node in enumerate(order)
             if node.target is ops.activate.overload}  # fmt: skip
    assert sorted(again) == list(range(12))
    kept = kept_of(run.result)
    assert len(kept) >= 2
    for site, place in again.items():
        after = next((each for each in kept if each > site), 12)  # where the block above starts
        assert place < backwards[site]
        assert after == 12 or backwards[after] < place


# ------------------------------------------------------------------------------------------------ the same bits
@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity"])
@pytest.mark.parametrize("collapse", ["mean", "learned"])
def test_bits(variant: str, collapse: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "_refusal", lambda node, options: "")  # nothing is fused here, with or without it
    options = {"variant": variant, "init": "paper", "collapse": collapse}
    off = Run(model(3, SpelledNorm), **options)
    run = forced("logits", lambda: Run(model(3, SpelledNorm), recompute=2 * STATE, **options))
    assert run.left == run.merged["forward"] >= 6
    assert run.count(ops.activate.overload) >= 6
    assert run.count(ops.coefficients.overload) == 0
    same(off, run)


def test_checkpoints_of_the_model() -> None:
    def body(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    off = Run(model(4, body=body))
    run = forced("logits", lambda: Run(model(4, body=body), recompute=3 * STATE))
    assert run.saved_results_of(ops.coefficients.overload) == [(site, 3) for site in range(8)]
    assert run.count(ops.coefficients.overload) == 0
    assert run.count(ops.activate.overload) == 8
    same(off, run)


@pytest.mark.parametrize("budget", [0.0, 0.5])
def test_activation_memory_budget(budget: float) -> None:
    """Half of it leaves the plan alone; with none at all everything runs twice, the projection with it."""
    off = Run(model(3))
    with torch._functorch.config.patch(activation_memory_budget=budget):
        run = forced("logits", lambda: Run(model(3), recompute=3 * STATE))
    if budget:
        assert run.saved_results_of(ops.coefficients.overload) == [(site, 3) for site in range(6)]
    else:
        assert run.merged["backward"] == 6
        assert run.count(ops.activate.overload) == 0
    same(off, run)


def test_what_wants_no_gradient() -> None:
    """The model's own weights are frozen but for the last layer's: of hyper-connections every one still learns."""

    def run(**options: Any) -> Run:
        module = model(3)
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("layers.2" in name)
        return Run(module, init="paper", **options)

    off, alone = run(), forced("logits", lambda: run(recompute=2 * STATE))
    assert alone.left == 6
    same(off, alone)
