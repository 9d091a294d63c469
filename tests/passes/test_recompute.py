from __future__ import annotations

import itertools
import re
from collections import Counter
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import ops
from mhc_compile.config import Options, resolve
from mhc_compile.convert import Conversion, convert
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.passes import PassContext
from mhc_compile.passes.recompute import PLAN_KEY, RecomputeResult, inductor_settings, plan_key, recompute
from tests.passes.models import WIDTH, conversions, tokens
from tests.passes.planned import STATE, Run, kept_of, model, plan_of, same


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
@pytest.mark.parametrize("folded", [False, True], ids=["spelled", "folded"])
def test_saved_tensors_are_those_of_the_plan(
    layers: int, wanted: str, folded: bool, request: pytest.FixtureRequest
) -> None:
    """With the branches' norms as the model spells them, and (as on a GPU) as one op with their pre."""
    if folded:
        request.getfixturevalue("everywhere")
    sites = 2 * layers
    off = Run(model(layers))
    run = Run(model(layers), recompute="memory" if wanted == "memory" else (sites // 3 + 1) * STATE)
    rows = run.result.rows
    assert len(rows) == sites
    kept = kept_of(run.result)
    inputs = [row.index for row in rows if row.branch_input == "kept"]
    replayed = sites - len(inputs)
    assert 0 < len(kept) < sites
    assert run.result.changed == sites - len(kept) + replayed
    # Our ops: states at the boundaries, the four results of every site's coefficients, the inputs that are kept (of a
    # folded norm the statistics; its result is saved as the view that the branch's projections read).
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept]
    assert run.saved_of(ops.expand.overload) == []
    assert run.saved_of(ops.pre.overload) == ([] if folded else inputs)
    assert run.saved_results_of(ops.pre_norm.overload) == ([(index, 1) for index in inputs] if folded else [])
    every = [(index, result) for index in range(sites) for result in range(4)]
    assert run.saved_results_of(ops.coefficients.overload) == every
    # Everything else: as without recompute, but for the norms of replayed inputs (their means instead of their results
    # and reciprocal roots; of a folded one nothing), and the value that is expanded.
    gone, new = off.kinds - run.kinds, run.kinds - off.kinds
    spelled = {} if folded else {f"rsqrt{[2, 5, 1]}": replayed}
    assert gone == Counter({f"view{[10, WIDTH]}": replayed} | spelled)
    spelled = {} if folded else {f"mean{[2, 5, 1]}": replayed}
    assert new == Counter({f"view{[2, 5, WIDTH]}": 1} | spelled)
    # The replay: each state that is not kept once, each input that is not kept once, no projection, no branch.
    assert run.count(ops.post.overload) == sites - 1 - len(kept)
    assert run.count(ops.pre.overload) == (0 if folded else replayed)
    assert run.count(ops.pre_norm.overload) == (replayed if folded else 0)
    assert run.count(ops.expand.overload) == 1
    assert run.count(ops.coefficients.overload) == run.count(ops.sinkhorn.overload) == 0
    for target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default):
        assert run.count(target) == off.count(target)
    same(off, run)


@pytest.mark.usefixtures("everywhere")
def test_saved_tensors_where_the_branch_input_is_kept_for_its_norm() -> None:
    """In ``single_pass`` a folded norm gives u as well, which is kept and replayed with its result."""
    off, run = Run(model(4), variant="single_pass"), Run(model(4), variant="single_pass", recompute="memory")
    kept = kept_of(run.result)
    norms = [row.index - 1 for row in run.result.rows if row.branch_input == "kept"]  # the first state has none
    assert 0 < len(norms) < 8
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept]
    assert run.saved_results_of(ops.pre_norm.overload) == [(index, result) for index in norms for result in (1, 2)]
    assert run.count(ops.pre_norm.overload) == 8 - len(norms)
    assert run.count(ops.post.overload) == 8 - len(kept)
    same(off, run)


Places = dict[int, int]
"""Of states or sites: where in a graph (or in code) something happens to them."""


def assert_blocks_in_turn(result: RecomputeResult, replays: Places, ends: Places, backwards: Places) -> None:
    """Each block is replayed between the last post's backward of the block above and its own first one, and what it
    made is read for the last time (or freed: ``ends``) before the block below is replayed."""
    kept, sites = kept_of(result), len(result.rows)
    blocks = [(0, kept[0]), *itertools.pairwise([*kept, sites])]
    assert sorted(replays) == [state for state in range(sites) if state not in kept]
    assert list(backwards.values()) == sorted(backwards.values())
    before = max(ends.values())
    for first, after in blocks:
        own = [state for state in range(first, after) if state in replays]
        if not own:
            continue
        starts = [replays[state] for state in own]
        assert starts == sorted(starts)
        assert max(starts) < backwards[after - 1]
        assert after == sites or backwards[after] < min(starts)
        assert max(ends[state] for state in own) <= before
        before = min(starts)


@pytest.mark.parametrize(("layers", "wanted"), [(6, 4 * STATE), (6, "memory"), (12, 8 * STATE)])
def test_replay_starts_when_its_block_does(layers: int, wanted: int | str) -> None:
    """Not all at once, and a block's states are gone when the next one's come."""
    run = Run(model(layers), recompute=wanted)
    order = {node: index for index, node in enumerate(run.graphs["backward"].nodes)}
    state_of = {node.name: index + 1 for index, node in enumerate(run.made(ops.post.overload))}
    state_of |= {node.name: 0 for node in run.made(ops.expand.overload)}
    again = (ops.post.overload, ops.expand.overload)
    replays = {state_of[node.name]: place for node, place in order.items() if node.target in again}
    ends = {state_of[node.name]: max(map(order.__getitem__, node.users)) for node in order if node.target in again}
    backwards = [place for node, place in order.items() if node.target is ops.post.backward_overload]
    assert len(kept_of(run.result)) >= 2
    assert_blocks_in_turn(run.result, replays, ends, dict(zip(range(2 * layers)[::-1], backwards, strict=True)))


@pytest.mark.slow
def test_the_order_survives_inductor() -> None:
    """Its scheduler sorts the kernels of a graph for the least peak. Our ops are left as calls, to be seen in the code;
    the states are wide enough to be what counts."""
    from torch._inductor.utils import run_and_get_code

    from mhc_compile import compat

    conversion: Any = None

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal conversion
        conversion = convert(gm, inputs, resolve({"recompute": 3 * 40 * STATE}, None))
        inner = compat.inductor_compile(
            conversion.gm, conversion.inputs, inductor_settings(conversion.gm, Options(recompute=3 * 40 * STATE))
        )
        return lambda *args: inner(*args, *conversion.parameters.values)

    assert torch._inductor.config.reorder_for_peak_memory
    compiled = torch.compile(model(4), backend=backend)
    _, codes = run_and_get_code(lambda: compiled(tokens(2, 200, 3)).square().mean().backward())
    lines = codes[-1].splitlines()
    result = plan_of(conversion.report)
    kept = kept_of(result)
    assert len(kept) >= 2
    calls = re.compile(r"\s*(buf\d+) = torch\.ops\.mhc\.(post|expand|post_backward)\.default\(")
    found = [(place, *match.groups()) for place, line in enumerate(lines) if (match := calls.match(line))]
    places = [place for place, _, op in found if op == "post_backward"]
    states = [state for first, after in reversed([(0, kept[0]), *itertools.pairwise([*kept, 8])])
              for state in range(first, after) if state not in kept]  # fmt: skip
    replays, ends = {}, {}
    for state, (place, buffer, _) in zip(states, (call for call in found if call[2] != "post_backward"), strict=True):
        replays[state] = place
        value = next(m for line in lines[place:] if (m := re.fullmatch(rf"\s*(buf\d+) = {buffer}(\[0\])?\s*", line)))
        ends[state] = next(at for at, line in enumerate(lines) if re.match(rf"\s*del {value[1]}\b", line))
    assert_blocks_in_turn(result, replays, ends, dict(zip(range(8)[::-1], places, strict=True)))


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
    held = {"kept": STATE, "from source": STATE // 4, "replayed": 0}
    assert [row.kept_bytes for row in result.rows] == [held[row.state] for row in result.rows]
    inputs = sum(row.input_bytes for row in result.rows if row.branch_input == "kept")
    assert result.kept_bytes == sum(row.kept_bytes for row in result.rows) + inputs
    assert result.kept_without == sum(row.state_bytes + row.input_bytes for row in result.rows)
    assert result.peak < result.peak_without
    assert {row.coefficient_bytes for row in result.rows} == {2 * 5 * (4 + 4 + 16 + 25) * 4}
    assert {row.output_bytes for row in result.rows} == {STATE // 4}
    assert all(":" in row.where for row in result.rows)


def test_the_report_says_bytes_a_site() -> None:
    """A line for each run of equal sites: of state and branch input what is kept and what is replayed."""
    settings: list[dict[str, Any]] = [{"recompute": 3 * STATE}, {"recompute": "memory"}, {}]
    _, _, (few, some, off) = conversions(model(4), [tokens()], settings)
    assert "bytes a site" not in str(off.report)
    assert "predicted peak" not in str(off.report)
    for outcome in (few, some):
        text, result = str(outcome.report), plan_of(outcome.report)
        assert f"predicted peak {result.peak / 1024:.1f} KiB" in text
        _, _, tail = text.partition("bytes a site ")
        lines = [re.split(r" {2,}", line) for line in tail.splitlines()[1:]]
        *table, (_, *sums) = lines[: next(at for at, line in enumerate(lines) if line[0] == "all together") + 1]
        seen = []
        for label, *cells in table:
            chain, first, last = re.fullmatch(r"(\d+)\.(\d+)(?:\.\.(\d+))?", label).groups()
            for index in range(int(first), int(last or first) + 1):
                row = result.rows[index]
                assert (row.chain, row.index) == (int(chain), index)
                replayed = 0 if row.state == "kept" else row.state_bytes
                inputs = (row.input_bytes, 0) if row.branch_input == "kept" else (0, row.input_bytes)
                wanted = (row.kept_bytes, replayed, *inputs, row.coefficient_bytes, row.output_bytes)
                assert cells == [f"{size / 1024:.1f} KiB" if size else "-" for size in wanted]
                seen.append(index)
        assert seen == list(range(8))
        assert len(table) < 8 or outcome is some, "equal neighbours share a line"
        kept = sum(row.kept_bytes for row in result.rows)
        assert sums[0] == f"{kept / 1024:.1f} KiB"
        assert '"replay_seconds"' in outcome.report.to_json()


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


def test_16_bits_round_on_a_cpu_with_a_plan_and_without_one() -> None:
    """Where there is a backward; a setting of the user's own goes over ours."""
    rounding = {"emulate_precision_casts": True}
    module, x = model(1).to(torch.bfloat16), tokens(dtype=torch.bfloat16)
    for options in (Options(), Options(recompute=STATE // 2)):
        _, _, (outcome,) = conversions(module, [x], [{"recompute": options.recompute}])
        assert rounding.items() <= inductor_settings(outcome.gm, options).items()
        with torch.no_grad():
            assert "emulate_precision_casts" not in inductor_settings(outcome.gm, options)
    _, _, (wide,) = conversions(model(1), [tokens()], [{}])
    assert inductor_settings(wide.gm, Options()) == {}
    plain, _, _ = conversions(module, [x], [])  # nothing of ours in it
    assert inductor_settings(plain, Options()) == {}


@pytest.mark.parametrize("asked", [None, False])
def test_the_user_s_rounding_goes_over_ours(asked: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    import mhc_compile.backend as backend

    seen: list[dict[str, Any]] = []

    def compile_graph(gm: fx.GraphModule, inputs: Any, settings: dict[str, Any]) -> Any:
        seen.append(settings)
        return gm.forward

    monkeypatch.setattr(backend.compat, "inductor_compile", compile_graph)
    options = {} if asked is None else {"inductor": {"emulate_precision_casts": asked}}
    torch.compile(model(1).to(torch.bfloat16), backend=backend.mhc, options=options)(tokens(dtype=torch.bfloat16))
    assert seen[0]["emulate_precision_casts"] == (asked is None)


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
