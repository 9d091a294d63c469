"""Recompute: tag what is kept for the backward and what is replayed from it; AOTAutograd's partitioner acts.

For every chain of stream states the plan of ``boundaries`` is written on the nodes (``node.meta["recompute"]``):

| kept (MUST_SAVE) | replayed (MUST_RECOMPUTE) |
|---|---|
| X_l at the boundaries, as the result of its post | X_l in between, as the result of its post |
| the value that is expanded at the head | the expanded X_0 |
| pre, post, res and the projection of every site | u_l, the result of its pre, and the norm that follows it |
| or the projection alone (``passes.logits``) | pre, post, res: gates and Sinkhorn |
| every branch output y, the reductions of that norm | |

Only our ops and that norm are run twice, never the rest of a branch, and never the product with phi: a replay reads the
coefficients or makes them of the projection. Our ops carry no checkpoint id, so that the ends of the user's own
activation checkpoints do not cut a block. The tags are not part of inductor's cache keys: ``plan_key`` is, see
``lowering.inductor``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx, nn
from torch.utils.checkpoint import CheckpointPolicy

from mhc_compile import cost, ops
from mhc_compile.config import Options
from mhc_compile.cost import Device, Work, bytes_of, is_view, value_of
from mhc_compile.lowering import kernels
from mhc_compile.lowering.logits_alone import TAG
from mhc_compile.passes import logits
from mhc_compile.passes.activations import Live, is_ours, kept_by_autograd, live_bytes, wants_gradient
from mhc_compile.passes.base import PassContext, PassResult
from mhc_compile.passes.boundaries import (
    Chain,
    Plan,
    Site,
    evaluate,
    fastest_of,
    fastest_within,
    keep_all,
    least_peak_of,
)
from mhc_compile.passes.logits import Logits, compare, total
from mhc_compile.passes.norms import Norm, find_norm
from mhc_compile.passes.states import State, find_states

PLAN_KEY = "mhc_plan_key"
"""Where the graph module's ``meta`` holds the identity of its tags, for inductor's caches."""

TOLERANCE = 0.01
"""With ``recompute="memory"``: of the plans whose peak is within this of the least, the fastest is taken."""


@dataclasses.dataclass(frozen=True)
class StateRow:
    """What becomes of one stream state and of what its site makes."""

    chain: int
    index: int
    where: str
    """``file:line`` of the site's add."""
    state: str
    """``kept``, ``replayed``, or ``from source`` for an expanded state that is rebuilt from what was expanded."""
    branch_input: str
    """``kept`` or ``replayed``."""
    state_bytes: int
    kept_bytes: int
    """Of the state, or of the value that it is expanded from; 0 for one that is replayed from the state before."""
    input_bytes: int
    """u_l, and the norm where it is replayed with it."""
    coefficient_bytes: int
    output_bytes: int


@dataclasses.dataclass
class RecomputeResult(PassResult):
    """The plan; ``changed`` counts the states and branch inputs that are replayed and the coefficients made again."""

    rows: list[StateRow] = dataclasses.field(default_factory=list)
    peak: int = 0
    """Predicted peak of a training step over this graph in bytes: parameters, gradients, activations."""
    peak_without: int = 0
    """The same without recompute."""
    kept_bytes: int = 0
    """Stream states and branch inputs kept."""
    kept_without: int = 0
    replay_seconds: float = 0.0
    """Predicted time of the replay."""
    device: str = ""
    """Whose numbers the time is from."""
    logits: Logits = dataclasses.field(default_factory=Logits)
    """Whether the coefficients are kept with the logits, and what the one and the other come to."""


@dataclasses.dataclass
class _Planned:
    """A chain of states with what the optimiser sees of it."""

    states: list[State]
    norms: list[list[Norm]]
    chain: Chain
    alone: Chain | None = None
    """The chain with the logits alone kept; None where that is no choice."""
    remade: list[fx.Node] = dataclasses.field(default_factory=list)
    """The coefficients that are made again there."""
    refusal: str = ""
    """Why none are."""
    plan: Plan | None = None
    """None: nothing is replayed."""
    is_alone: bool = False
    """True where the plan is one of `alone`."""

    @property
    def again(self) -> list[fx.Node]:
        """The coefficients that the plan makes again."""
        return self.remade if self.is_alone else []

    def forms(self) -> list[Chain]:
        """The chains that the plan is chosen of."""
        forms = {"coefficients": self.chain, "logits": self.alone}
        return [chain for form in logits.FORMS if (chain := forms[form]) is not None] or [self.chain]


def recompute(gm: fx.GraphModule, ctx: PassContext) -> RecomputeResult:
    """Choose and tag. With ``recompute="off"``, and in a graph without gradients, nothing is tagged.

    Running it again changes nothing.
    """
    result = RecomputeResult("recompute")
    if ctx.options.recompute != "off":
        _recompute(gm, ctx, result)
    gm.meta[PLAN_KEY] = plan_key(gm)
    return result


def inductor_settings(gm: fx.GraphModule, options: Options) -> dict[str, object]:
    """Settings of inductor that a plan wants, for the user's own to go over.

    Inductor hands the memory of a dead buffer on to the next one of the same size, however far behind, and holds it
    until then: a layer's widest gradients (240 MB of the Qwen3 shape at 4096 tokens) would be there all through the
    layer below. A replay frees what it made, and PyTorch's allocator finds it again.

    In 16 bits on a CPU, with a plan and without one (the two are to be the same bits), every operation rounds. Else a
    fused kernel reads what another operation of the kernel made as it was before it was rounded, a replay and what it
    replays are fused with different neighbours, and all results differ. It costs 5 % of a step (two layers of Qwen3,
    hidden 256, 512 tokens, bf16). Without 16-bit values inductor writes the same code either way, and without a
    backward there is nothing to replay: neither is touched. On a GPU our kernels round what they write.
    """
    settings: dict[str, object] = {}
    if options.recompute != "off" and gm.meta.get(PLAN_KEY):
        settings["allow_buffer_reuse"] = False
    if _has_backward(gm) and any(map(is_ours, gm.graph.nodes)) and _has_16_bits_on_cpu(gm):
        settings["emulate_precision_casts"] = True
    return settings


def plan_key(gm: fx.GraphModule) -> str:
    """Identity of all recompute tags of a graph (the user's own checkpoints among them); empty without any."""
    digest = hashlib.sha256()
    regions: dict[object, int] = {}
    tagged = False
    for index, node in enumerate(gm.graph.nodes):
        policy = node.meta.get("recompute")
        if policy is None:
            continue
        tagged = True
        region = regions.setdefault(node.meta.get("ac_graph_id"), len(regions))  # ids differ from run to run
        digest.update(f"{index} {node.name} {policy} {region};".encode())
    return digest.hexdigest() if tagged else ""


def _recompute(gm: fx.GraphModule, ctx: PassContext, result: RecomputeResult) -> None:
    chains = find_states(gm.graph)
    if not chains:
        return
    is_parameter = _parameters(ctx)
    if not _has_backward(gm):
        result.notes.append("no gradient is asked for: nothing to keep, nothing to replay")
        return
    where = next((t.device for chain in chains for t in cost.tensors_of(value_of(chain[0].producer))), None)
    device = cost.device_of(where.type if where is not None else "cpu", (where.index or 0) if where is not None else 0)
    result.device = device.name if device.measured else f"{device.name} (nominal numbers)"
    planned = [_describe(gm.graph, states, is_parameter, device, where, ctx.options) for states in chains]
    others = sum(keep_all(each.chain).kept_bytes for each in planned)
    whole = others
    for index, each in enumerate(planned):
        own = keep_all(each.chain).kept_bytes
        each.chain = _with(each.chain, others - own)
        each.alone = _with(each.alone, others - own) if each.alone is not None else None
        forms = each.forms()
        found = _choose(forms, keep_all(each.chain), own / max(whole, 1), ctx, where, gm.graph, result)
        if found is not None:
            each.plan, each.is_alone = found[1], forms[found[0]] is each.alone
        chosen = each.plan if each.plan is not None else keep_all(each.chain)
        result.peak_without = max(result.peak_without, keep_all(each.chain).peak)
        result.peak = chosen.peak  # of the last chain: it sees what the others keep
        result.kept_bytes += chosen.kept_bytes
        result.kept_without += own
        result.replay_seconds += chosen.seconds
        others += chosen.kept_bytes - own
        result.rows += _rows(index, each, chosen)
        if each.plan is not None:
            result.changed += _tag(each, each.plan)
    result.logits = total([_compared(each, device) for each in planned])
    if result.changed:
        _untag_the_rest(gm.graph, planned)


# ------------------------------------------------------------------------------------------------ what there is
def _parameters(ctx: PassContext) -> Callable[[fx.Node], bool]:
    def is_parameter(node: fx.Node) -> bool:
        if node.op not in ("placeholder", "get_attr"):
            return False
        return ctx.is_parameter(node) or isinstance(value_of(node), nn.Parameter)

    return is_parameter


def _has_backward(gm: fx.GraphModule) -> bool:
    return torch.is_grad_enabled() and any(map(wants_gradient, gm.graph.find_nodes(op="placeholder")))


def _has_16_bits_on_cpu(gm: fx.GraphModule) -> bool:
    values = (value for node in gm.graph.nodes for value in cost.tensors_of(value_of(node)))
    return any(value.device.type == "cpu" and value.dtype in (torch.bfloat16, torch.float16) for value in values)


def _describe(
    graph: fx.Graph,
    states: list[State],
    is_parameter: Callable[[fx.Node], bool],
    device: Device,
    where: torch.device | None,
    options: Options,
) -> _Planned:
    """Bytes and seconds of a chain."""
    norms = [[norm for pre in state.pres if (norm := find_norm(pre, is_parameter))] for state in states]
    without = {pre for state in states for pre in state.pres}
    without |= {node for found in norms for norm in found for node in (*norm.replayed, *norm.reductions)}
    without |= {base for state in states if state.output is not None for base in _with_bases(state.output)}
    kept = kept_by_autograd(graph, is_parameter, without)
    kind, number = (where.type, where.index or 0) if where is not None else ("cpu", 0)

    def live_with(coefficients: Sequence[int]) -> Live:
        own = list(zip(coefficients, map(_output_bytes, states), strict=True))
        workspace, last = cost.library_bytes(kind, number), _last_gradient(states, options)
        return live_bytes(graph, states, is_parameter, kept, own, kind, workspace, last)

    live = live_with([logits.kept_bytes(state, ()) for state in states])
    run = _sites_a_call(states, options)
    sites: list[Site] = []
    for index, state in enumerate(states):
        source = bytes_of(state.producer.args[0]) if state.is_expanded else None
        first = index == 0 and not state.is_expanded
        early = _is_early(state)
        made = cost.work(state.producer).seconds(device) if not first else 0.0
        inputs = sum(cost.work(pre).seconds(device) for pre in state.pres)
        inputs += sum(_norm_work(norm).seconds(device) for norm in norms[index])
        written = sum(Work(0, bytes_of(pre)).seconds(device) - device.latency for pre in state.pres)
        sites.append(
            Site(
                state=bytes_of(state.producer),
                branch_input=_input_bytes(state, norms[index]),
                live=live.sites[index],
                state_seconds=made,
                input_seconds=inputs,
                source=source,
                pinned=first or state.shared,
                border=live.borders[index],
                early=early,
                early_seconds=written if early else None,
                run_seconds=_run_seconds(state, device) if run > 1 and early and index and sites[-1].early else None,
            )
        )
    chain = Chain(tuple(sites), live.head, run)
    remade, refusal = logits.made_again(states, options)
    alone = logits.logits_alone(states, chain, device, remade, live_with) if remade else None
    return _Planned(states, norms, chain, alone, remade, refusal)


def _is_early(state: State) -> bool:
    """True where one kernel makes a replayed state and its branch input (``lowering.post_pre_norm``)."""
    made_by_post = state.producer.target is ops.post.overload and not state.paths
    return made_by_post and len(state.pres) == 1 and state.pres[0].target is ops.pre_norm.overload


def _sites_a_call(states: list[State], options: Options) -> int:
    """How many early sites of a block one kernel replays (``lowering.replay_runs``)."""
    first = next((state for state in states if _is_early(state)), None)
    if first is None or options.lowering in ("native", "mlir") or not options.fuses("replay"):
        return 1
    return kernels.sites_a_replay(value_of(first.producer))


def _last_gradient(states: list[State], options: Options) -> int | None:
    """Bytes of the gradient that the last post takes from a collapse: one row for all streams, where a kernel reads
    that (``lowering.ends``). None for a whole state."""
    post = states[-1].post if states else None
    readers = [] if post is None else list(post.users)
    if post is None or [reader.target for reader in readers] != [ops.collapse.overload]:
        return None
    if options.lowering in ("native", "mlir") or not options.fuses("ends") or not kernels.takes_rows(value_of(post)):
        return None
    return bytes_of(readers[0])


def _run_seconds(state: State, device: Device) -> float:
    """Time of a ``post`` in a kernel that has the state before it in registers: no launch, and X is not read."""
    whole = cost.work(state.producer)
    work = dataclasses.replace(whole, read=whole.read - bytes_of(state.producer.args[0]))
    return work.seconds(device) - device.latency


def _norm_work(norm: Norm) -> Work:
    """One pass: the input is read once, the result written once."""
    source = next(other for other in norm.replayed[0].all_input_nodes if other not in norm.replayed)
    return Work(bytes_of(source), norm.result_bytes)


def _input_bytes(state: State, norms: list[Norm]) -> int:
    return sum(bytes_of(pre) for pre in state.pres) + sum(norm.result_bytes for norm in norms)


def _output_bytes(state: State) -> int:
    return bytes_of(state.output) if state.output is not None else 0


def _with_bases(node: fx.Node) -> list[fx.Node]:
    """A value and what it is a view of."""
    found = [node]
    while is_view(found[-1]) and found[-1].args and isinstance(found[-1].args[0], fx.Node):
        found.append(found[-1].args[0])
    return found


def _with(chain: Chain, more: int) -> Chain:
    """The chain with `more` bytes live all the time."""
    sites = tuple(dataclasses.replace(site, live=site.live + more, border=site.border + more) for site in chain.sites)
    return dataclasses.replace(chain, sites=sites, head=chain.head + more)


# ------------------------------------------------------------------------------------------------ what is chosen
def _choose(
    forms: list[Chain],
    everything: Plan,
    share: float,
    ctx: PassContext,
    where: torch.device | None,
    graph: fx.Graph,
    result: RecomputeResult,
) -> tuple[int, Plan] | None:
    """(which form of one chain, its plan); None where nothing has to be replayed.

    A number of bytes is one of stream states: with the first form, the coefficients kept.
    """
    wanted = ctx.options.recompute
    if isinstance(wanted, int):
        plan = _within_bytes(forms[0], int(wanted * share), result)
        return (0, plan) if plan is not None else None
    if wanted == "speed":
        limit = ctx.options.memory_budget
        if limit is None:
            limit = _free_bytes(where, graph)
        if limit is None or everything.peak <= limit:
            result.notes.append("everything fits: nothing is replayed")
            return None
        found = fastest_of(forms, limit)
        if found is not None:
            return found
        result.notes.append(f"no plan has a predicted peak within {limit:,} bytes: the one with the least is taken")
    found = least_peak_of(forms, TOLERANCE)
    if found is None or found[1].peak >= everything.peak:
        result.notes.append("the predicted peak is elsewhere (weights and their gradients): nothing is replayed")
        return None
    return found


def _within_bytes(chain: Chain, allowed: int, result: RecomputeResult) -> Plan | None:
    """As many states as fit, spread for the least peak; the branch inputs, which are not states, are all replayed."""
    if keep_all(chain).kept_bytes <= allowed:
        return None
    sites = tuple(dataclasses.replace(site, input_seconds=0.0, early_seconds=None) for site in chain.sites)
    states = dataclasses.replace(chain, sites=sites)
    found = fastest_within(states, allowed)
    plan = evaluate(chain, found.kept if found is not None else ())
    if found is None:
        result.notes.append(f"{allowed:,} bytes do not hold what has to be kept, {plan.kept_bytes:,} bytes")
    return plan


def _free_bytes(where: torch.device | None, graph: fx.Graph) -> int | None:
    """What this graph may take of its device, its parameters and inputs included; None for no limit (a CPU)."""
    if where is None or where.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(where)
    idle = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
    there = sum(bytes_of(node) for node in graph.find_nodes(op="placeholder"))
    return int(0.95 * (free + idle + there))  # the rest for fragmentation


# ------------------------------------------------------------------------------------------------ what is written
def _set(node: fx.Node, policy: CheckpointPolicy) -> None:
    node.meta["recompute"] = policy
    node.meta.pop("ac_graph_id", None)


def _tag(planned: _Planned, plan: Plan) -> int:
    """Write a plan on the nodes; returns how many states, inputs and coefficients are made again."""
    save, replay = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE
    kept, inputs = set(plan.kept), set(plan.inputs)
    count = 0
    for index, (state, norms) in enumerate(zip(planned.states, planned.norms, strict=True)):
        replayed = state.is_expanded or index not in kept
        if state.producer.op == "call_function":
            _set(state.producer, replay if replayed else save)
        count += replayed
        for node in state.paths:
            _set(node, replay)
        for node in state.coefficients:
            _set(node, TAG if node in planned.again else save)
            count += node in planned.again
        if state.output is not None:
            for node in _with_bases(state.output):
                if node.op in ("call_function", "call_method"):
                    _set(node, save)
        for pre in state.pres:
            _set(pre, save if index in inputs else replay)
        if index not in inputs:
            count += bool(state.pres)
            for norm in norms:
                for node in norm.replayed:
                    _set(node, replay)
                for node in norm.reductions:
                    _set(node, save)
    return count


def _untag_the_rest(graph: fx.Graph, planned: list[_Planned]) -> None:
    """Take a checkpoint's tags from our ops that the plan does not name: the last post, collapses, getitems."""
    named = {
        node
        for each in planned
        if each.plan is not None
        for state in each.states
        for node in (state.producer, *state.paths, *state.pres, *state.coefficients)
    }
    overloads = {op.overload for op in ops.OPS.values()} - {ops.stream_norm.overload}  # always replayed: its own tag
    for node in graph.nodes:
        source = node.args[0] if node.target is operator.getitem else node
        if isinstance(source, fx.Node) and source.target in overloads and node not in named:
            node.meta.pop("recompute", None)
            node.meta.pop("ac_graph_id", None)


# ------------------------------------------------------------------------------------------------ what is told
def _compared(planned: _Planned, device: Device) -> Logits:
    every = [node for state in planned.states for node in state.coefficients]
    return compare(planned.remade or every, planned.chain, device, planned.is_alone, planned.refusal)


def _rows(chain: int, planned: _Planned, plan: Plan) -> list[StateRow]:
    kept, inputs = set(plan.kept), set(plan.inputs)
    rows = []
    for index, state in enumerate(planned.states):
        site = planned.chain.sites[index]
        how, held = ("kept", site.cost) if index in kept else ("replayed", 0)
        if state.is_expanded:
            how, held = ("from source", site.cost) if planned.plan is not None else (how, site.state)
        rows.append(
            StateRow(
                chain,
                index,
                state.where,
                how,
                "kept" if index in inputs else "replayed",
                site.state,
                held,
                site.branch_input,
                logits.kept_bytes(state, planned.again),
                _output_bytes(state),
            )
        )
    return rows
