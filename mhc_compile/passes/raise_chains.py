"""Raise hand-written hyper-connections: chains of small operations become the semantic ops, with their own numbers.

Each pattern finds candidates on the graph as it is. A candidate is taken only if its region can be taken out (nobody
reads the inside, nothing written in place has a second name, one grad mode) and if the judge, in float64, finds the new op
equal to the old nodes in value and gradient. What was almost taken is reported with its reason. It runs before autograd,
on the torch-level graph, so that our backward replaces the unrolled one; nothing is re-traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import fx

from mhc_compile.capture import Builder, qualified_module, user_line
from mhc_compile.passes.base import PassContext, PassResult, Refusal
from mhc_compile.patterns import coefficients, collapse, mix, reading, sinkhorn
from mhc_compile.patterns.base import Candidate, Refused, Unarrangeable
from mhc_compile.patterns.judge import Judge
from mhc_compile.patterns.region import GraphFacts, Region, obstacle, region, relink_writes


def raise_chains(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Replace every recognised chain of ``gm`` in place. ``changed`` counts the ops that were raised, ``notes`` says which,
    ``refusals`` what was almost one and why it stays."""
    raiser = Raiser(gm, ctx)
    relink_writes(gm.graph)
    raiser.take(sinkhorn.find(gm.graph), raiser.facts())
    facts = raiser.facts()
    sites, states = mix.find(gm.graph, facts)
    raiser.take([*sites, *coefficients.find(states, facts), *collapse.find(gm.graph, states)], facts)
    raiser.sweep()
    if raiser.raised:
        gm.recompile()
    notes = [f"{count} x {what}" for what, count in sorted(raiser.raised.items())]
    return PassResult("raise_chains", changed=sum(raiser.raised.values()), notes=notes, refusals=raiser.refusals)


class Raiser:
    """Checks candidates and lets them take over."""

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.judge = Judge()
        self.raised: Counter[str] = Counter()
        self.refusals: list[Refusal] = []

    def facts(self) -> GraphFacts:
        """What the patterns ask about the graph as it is now."""
        return GraphFacts(self.gm.graph, self._is_parameter)

    def _is_parameter(self, node: fx.Node) -> bool:
        return self.ctx.is_parameter(node) or isinstance(reading.value(node), torch.nn.Parameter)

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
        """Build the new nodes before the first output and let the judge compare; None (and a refusal) if they differ."""
        point = min(candidate.outputs, key=facts.order.__getitem__)
        before = set(self.gm.graph.nodes)
        builder = Builder(self.gm)
        reason: str | None
        try:
            with builder.at(before=point):
                new = candidate.build(builder)
        except Unarrangeable as error:
            new, reason = (), str(error)
        else:
            created = self._created(point, before)
            _hoist(created, point, facts)
            leaves = list(part.leaves)
            read = {n for node in created for n in node.all_input_nodes if n not in before or n in part.leaves}
            helpers = _helpers(created, set(leaves), before, facts)
            reason = self.judge.disagreement(
                candidate.outputs, new, leaves + [n for n in helpers[0] if n not in leaves], part.nodes, helpers[1] + created
            )
            del read
        if reason is None:
            return new
        for node in reversed(self._created(point, before)):
            self.gm.graph.erase_node(node)
        self.refuse(Refused(candidate.what, reason, candidate.outputs[-1]))
        return None
