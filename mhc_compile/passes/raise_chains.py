"""Raise hand-written hyper-connections: chains of small operations become the semantic ops, with their own numbers.

Each pattern finds candidates on the graph as it is. A candidate is taken only if its region can be taken out (nobody
reads the inside, nothing written in place has a second name, one grad mode) and if the judge, in float64, finds the
new op equal to the old nodes in value and gradient. What was almost taken is reported with its reason. It runs before
autograd, on the torch-level graph, so that our backward replaces the unrolled one; nothing is re-traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx

from mhc_compile import ops
from mhc_compile.capture import Builder, qualified_module, user_line
from mhc_compile.compat import source_name
from mhc_compile.lowering.inline import between
from mhc_compile.passes.base import PassContext, PassResult, Refusal
from mhc_compile.patterns import channel_pre, coefficients, collapse, mix, reading, sinkhorn, stream_norm
from mhc_compile.patterns.base import Candidate, Refused, Unarrangeable
from mhc_compile.patterns.judge import Judge
from mhc_compile.patterns.memo import unchanged
from mhc_compile.patterns.region import GraphFacts, Region, obstacle, region, relink_writes


def raise_chains(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace every recognised chain of ``gm`` in place.

    ``changed`` counts the raised ops, ``notes`` says which, ``refusals`` what was almost one and why it stays.
    """
    if not ctx.options.raise_patterns:
        return PassResult("raise_chains", notes=["switched off by option raise_patterns"])
    raiser = Raiser(gm, ctx)
    relink_writes(gm.graph)
    with unchanged():
        chains = list(sinkhorn.find(gm.graph))
    raiser.take(chains, raiser.facts())
    facts = raiser.facts()
    with unchanged():
        sites, states = mix.find(gm.graph, facts)
        norms, normed = stream_norm.find_each(gm.graph, states, facts.static)
        sites += [*norms, *channel_pre.find(gm.graph, states, normed, facts.static), *mix.unread(states)]
        sites += [*coefficients.find(states, facts), *collapse.find(gm.graph, states)]
    raiser.take(sites, facts)
    raiser.sweep()
    if raiser.raised:
        gm.recompile()
    left = Counter({what: count for what, count in raiser.raised.items() if count})
    notes = [f"{count} x {what}" for what, count in sorted(left.items())]
    return PassResult("raise_chains", changed=left.total(), notes=notes, refusals=raiser.refusals)


class Raiser:
    """Checks candidates and lets them take over."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.judge = Judge()
        self.raised: Counter[str] = Counter()
        self.refusals: list[Refusal] = []
        self.erased: set[fx.Node] = set()
        self.unread = {node for node in gm.graph.nodes if not node.users}

    def facts(self) -> GraphFacts:
        """What the patterns ask about the graph as it is now."""
        return GraphFacts(self.gm.graph, self._is_parameter)

    def _is_parameter(self, node: fx.Node) -> bool:
        if self.ctx.is_parameter(node) or isinstance(reading.value(node), torch.nn.Parameter):
            return True
        source = getattr(node, "_dynamo_source", None)
        return source is not None and "._buffers[" in source_name(source)

    def take(self, found: Iterable[Candidate | Refused], facts: GraphFacts) -> None:
        """Check all candidates on the graph as it is, then let those that pass take over, in the order of the graph."""
        accepted: list[tuple[Candidate, Region]] = []
        for candidate in found:
            if isinstance(candidate, Refused):
                self.refuse(candidate)
                continue
            part = region(candidate.outputs, candidate.inputs, facts)
            problem = obstacle(part, candidate.outputs, facts)
            if problem is None:
                accepted.append((candidate, part))
            else:
                self.refuse(Refused(candidate.what, *problem))
        built = [(candidate, part, self.build(candidate, part, facts)) for candidate, part in accepted]
        for candidate, part, new in built:
            if new is not None:
                self.replace(candidate, part, new)

    def build(self, candidate: Candidate, part: Region, facts: GraphFacts) -> tuple[fx.Node, ...] | None:
        """Build the new nodes before the first output; None (and a refusal) if the judge finds a difference."""
        point = min(candidate.outputs, key=facts.order.__getitem__)
        previous = point.prev
        builder = Builder(self.gm)
        reason: str | None = None
        new: tuple[fx.Node, ...] = ()
        try:
            with builder.at(before=point):
                new = candidate.build(builder)
        except Unarrangeable as error:
            reason = str(error)
        except (RuntimeError, TypeError, ValueError) as error:  # the op itself does not take these shapes or types
            reason = f"the op cannot be built here: {str(error).splitlines()[0]}"
        created = between(previous, point)
        if reason is None:
            reason = _hoist(created, facts)
        if reason is None:
            nodes, leaves = _closure(new, candidate.inputs)
            inputs = list(dict.fromkeys([*candidate.inputs, *part.leaves, *leaves]))
            reason = self.judge.disagreement(candidate.outputs, new, inputs, part.nodes, nodes)
        if reason is None:
            for node in created:
                node.meta.update({key: point.meta[key] for key in _TAGS if key in point.meta})
            return new
        for node in reversed(created):
            self.gm.graph.erase_node(node)
        self.refuse(Refused(candidate.what, reason, candidate.outputs[-1]))
        return None

    def replace(self, candidate: Candidate, part: Region, new: tuple[fx.Node, ...]) -> None:
        """Readers of the outputs read the new nodes; what nobody reads any more goes."""
        members = set(part.nodes)
        reading.pin_floats(part.nodes)
        for output, value in zip(candidate.outputs, new, strict=True):
            output.replace_all_uses_with(value)
        for name in candidate.names:
            name.replace_all_uses_with(new[0], delete_user_cb=lambda user: user not in members)
        for node in reversed(part.nodes):
            if not node.users and node not in self.erased:  # a view may lie in the regions of two candidates
                self.gm.graph.erase_node(node)
                self.erased.add(node)
        self.raised[candidate.what] += 1
        self.raised["sinkhorn"] -= sum(node.target is ops.sinkhorn.overload for node in part.nodes)  # now inside it

    def refuse(self, refusal: Refused) -> None:
        """Keep a refusal for the report."""
        node = refusal.node
        self.refusals.append(Refusal(refusal.what, refusal.reason, user_line(node), qualified_module(node)))

    def sweep(self) -> None:
        """Erase what only the replaced regions read: views, casts, splits and other known pure operations."""
        for node in reversed(self.gm.graph.nodes):
            if node.users or node.op not in ("call_function", "call_method") or node in self.unread:
                continue
            name, inplace = reading.called_name(node)
            if name and not inplace:
                self.gm.graph.erase_node(node)


_TAGS = ("recompute", "ac_graph_id", "custom")
"""What a checkpoint or a user wrote on a node, and the nodes in its place must say as well."""


def _hoist(created: list[fx.Node], facts: GraphFacts) -> str | None:
    """Move prepared parameters (a split bias, an unbound scale) in front of the new nodes that read them."""

    def lift(node: fx.Node) -> bool:
        if node < created[0]:
            return True
        if node not in facts.static or not all(lift(source) for source in node.all_input_nodes):
            return False
        created[0].prepend(node)
        return True

    own = set(created)
    for node in created:
        for source in node.all_input_nodes:
            if source not in own and not lift(source):
                return f"`{source.name}` is computed after the first of the values that would be replaced"
    return None


def _closure(outputs: Iterable[fx.Node], inputs: Iterable[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """(nodes that compute the outputs from the inputs, in graph order; placeholders that they read besides)."""
    stop, seen, leaves = set(inputs), set[fx.Node](), list[fx.Node]()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node in stop or node in seen:
            continue
        if node.op in ("placeholder", "get_attr"):
            leaves.append(node)
            stop.add(node)
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return sorted(seen), leaves
