"""Widen residual chains to n streams: the rewrite that consumes what ``find_sites`` found.

For a chain with head h and sites l = 0..L-1 the pass builds (single_pass in brackets, see 1-math)

    X_0     = expand(h)                                                  right after the producer of h
    pre, post, res = coefficients(X_l, phi_l, b_l, α_l)                  right after the producer of X_l
    u_l     = pre(X_l, pre)            [pre of site l-1; h itself for l = 0]
    X_{l+1} = post(X_l, F_l(u_l), post, res)                             at the place of the user's add
    x       = collapse(X_L)            [pre(X_L, pre of site L-1)]       right after the producer of X_L

Only the branch F reads u; every other reader of a stream value (returned hidden states, skips, heads) gets the
collapsed stream. Nodes are placed after their producers, never before their first reader: a reader may stand inside a
``no_grad`` or autocast region that the stream does not.

Operations on the stream between sites are applied to every stream alike. A chain is rewritten as a whole or, if
anything about it cannot be expressed, not at all: whatever can fail is checked before the first edit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mhc_compile import ops
from mhc_compile.capture.graph import Builder, meta_value
from mhc_compile.capture.mutation import op_name, remove_dead
from mhc_compile.config import Options
from mhc_compile.passes.base import PassContext, PassResult, Refusal
from mhc_compile.passes.respell import fold
from mhc_compile.passes.sites import ResidualChain, ResidualSite
from mhc_compile.passes.streams import StreamBuilder, StreamValue

_PARAMETER_NAMES = ("phi", "bias", "alpha_pre", "alpha_post", "alpha_res")


def coefficient_spec(options: Options) -> ops.CoefficientSpec:
    """The coefficients of a site of a rewritten model, by variant (1-math, "Variants")."""
    if options.variant == "identity":
        return ops.CoefficientSpec(layout="pre,post", streams=options.streams, res="none", sinkhorn=None)
    if options.variant == "hc":
        return ops.CoefficientSpec(streams=options.streams, gate="linear", post_scale=1.0, res="linear", sinkhorn=None)
    sinkhorn = ops.SinkhornSpec(steps=2 * options.sinkhorn_iters)
    return ops.CoefficientSpec(streams=options.streams, sinkhorn=sinkhorn)


def head_spec(options: Options) -> ops.CoefficientSpec:
    """The learned collapse: a gate for every stream, nothing else."""
    return ops.CoefficientSpec(layout="pre", streams=options.streams, res="none", sinkhorn=None)


def widen(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Rewrite every chain of ``ctx.chains``; ``changed`` is the number of sites widened.

    ``streams=1`` leaves the graph as it was. Running it again finds no chain: the adds are gone.
    """
    result = PassResult("widen")
    if ctx.options.streams == 1 or not ctx.chains:
        fold(gm)
        return result
    replaced: dict[fx.Node, fx.Node] = {}
    unread = [node for node in gm.graph.nodes if not node.users]
    for chain in ctx.chains:
        reason = _obstacle(chain, ctx.options)
        if reason:
            result.refusals.extend(Refusal("residual add", reason, site.where, site.module) for site in chain.sites)
            continue
        _remap(chain, replaced)
        _ChainWidener(gm, ctx, chain, replaced).run()
        result.changed += len(chain.sites)
    fold(gm)
    remove_dead(gm, unread)
    return result


def _obstacle(chain: ResidualChain, options: Options) -> str:
    """Why the chain cannot be written in the chosen variant; empty if it can."""
    if options.variant != "single_pass":
        return ""
    for site in chain.sites:
        if any(_moves_tokens(node) for node in site.entry_path + site.carrier_path):
            return (
                f"single_pass mixes a site with the coefficients of the site before it, but the stream changes its "
                f"token layout before the add at {site.where or site.add.name}; variant='mhc' has no such limit"
            )
    return ""


def _moves_tokens(node: fx.Node) -> bool:
    before = next((v for arg in node.args if isinstance(v := meta_value(arg), torch.Tensor)), None)  # 0.5 * x too
    after = meta_value(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return True
    pointwise = (
        "to float half bfloat16 double contiguous clone detach type type_as dropout add sub mul div truediv "
        "masked_fill layer_norm rms_norm set_item"
    )
    return op_name(node) not in pointwise.split()


def _remap(chain: ResidualChain, replaced: dict[fx.Node, fx.Node]) -> None:
    """Point a chain at the nodes that an earlier chain's rewrite has put in the place of those it was found on."""

    def now(node: fx.Node) -> fx.Node:
        while node in replaced:
            node = replaced[node]
        return node

    for site in chain.sites:
        site.stream, site.carrier = now(site.stream), now(site.carrier)
        site.outputs = [(now(node), factor) for node, factor in site.outputs]


class _ChainWidener:
    def __init__(
        self, gm: fx.GraphModule, ctx: PassContext, chain: ResidualChain, replaced: dict[fx.Node, fx.Node]
    ) -> None:
        self.gm, self.ctx, self.chain, self.replaced = gm, ctx, chain, replaced
        self.options = ctx.options
        self.builder = Builder(gm)
        self.streams = StreamBuilder(self.builder)
        self.spec = coefficient_spec(ctx.options)
        self.previous_pre: fx.Node | None = None
        """single_pass: the pre coefficients of the site before."""
        self.erased: set[fx.Node] = set()
        self.states: list[tuple[ResidualSite, StreamValue, fx.Node | None]] = []
        """After each site: its streams, and the coefficients that collapse them in single_pass."""

    def run(self) -> None:
        head = self.chain.head
        state = self._expand(head)
        origin = head
        for site in self.chain.sites:
            state = self._site(site, state, origin)
            origin = site.add
        self._read_out()

    def _expand(self, head: fx.Node) -> StreamValue:
        channel = self.chain.sites[0].channel
        after = head
        while head.op == "placeholder" and after.next.op == "placeholder":
            after = after.next
        self.builder.tags = self.chain.sites[0].add
        with self.builder.at(after=after, like=self.chain.sites[0].add):
            value = self.streams.channels_last(head, channel)
            node = self.builder.call(ops.expand.overload, value, self.options.streams)
        return StreamValue(node, channel)

    def _site(self, site: ResidualSite, state: StreamValue, origin: fx.Node) -> StreamValue:
        self.builder.tags = site.add
        versions = {origin: state}
        entry = self.streams.apply(site.entry_path, origin, site.stream, versions, site.channel)
        carrier_axis = _carrier_axis(site)
        carrier = self.streams.apply(site.carrier_path, site.stream, site.carrier, versions, carrier_axis)
        width = int(meta_value(entry.node).shape[-1])
        assert self.ctx.parameters is not None
        parameters = self.ctx.parameters.site(self.chain, site, self.spec, width)
        coefficients = self._coefficients(entry, parameters, site)
        self._read_in(site, versions, entry, coefficients, parameters)
        if carrier.node is not entry.node and _token_shape(carrier) != _token_shape(entry):
            coefficients = self._coefficients(carrier, parameters, site)  # the same numbers, in the carrier's layout
        result = self._post(site, carrier, coefficients)
        self.previous_pre = coefficients["pre"]
        self.states.append((site, result, coefficients["pre"] if self.options.variant == "single_pass" else None))
        return result

    def _coefficients(
        self, state: StreamValue, parameters: dict[str, fx.Node], site: ResidualSite
    ) -> dict[str, fx.Node]:
        with self.builder.at(after=state.node, like=site.add):
            arguments = [parameters.get(name) for name in _PARAMETER_NAMES]
            node = self.builder.call(ops.coefficients.overload, state.node, *arguments, **self.spec.op_arguments())
            parts = {}
            for index, name in enumerate(("pre", "post", "res")):
                if name in self.spec.parts:
                    parts[name] = self.streams.getitem(node, index)
        return parts

    def _read_in(
        self,
        site: ResidualSite,
        versions: dict[fx.Node, StreamValue],
        entry: StreamValue,
        coefficients: dict[str, fx.Node],
        parameters: dict[str, fx.Node],
    ) -> None:
        """Let the branch read ``pre(X, ·)`` in the place of every stream value that it reads."""
        single = self.options.variant == "single_pass"
        for original in [site.stream, *site.carrier_path]:
            readers = [user for user in original.users if user in site.branch]
            if not readers or original not in versions:
                continue
            state = versions[original]
            own = coefficients
            if _token_shape(state) != _token_shape(entry):
                own = self._coefficients(state, parameters, site)
            gate = self.previous_pre if single else own["pre"]
            after = state.node if single else own["pre"]
            with self.builder.at(after=self._later(state.node, after, gate), like=site.add):
                if gate is None and state.node.target is ops.expand.overload:
                    (mixed,) = state.node.all_input_nodes  # what all streams are: for one of them n get a gradient
                elif gate is None:
                    mixed = self.builder.method("select", state.node, -2, 0)
                else:
                    mixed = self.builder.call(ops.pre.overload, state.node, gate)
                mixed = self.streams.channels_back(mixed, state.channel)
            for reader in readers:
                reader.replace_input_with(original, mixed)

    def _later(self, *nodes: fx.Node | None) -> fx.Node:
        """The last of the nodes in graph order, skipping the getitems that follow it."""
        known = [node for node in nodes if node is not None]
        last = known[0]
        for node in known[1:]:
            if last < node:
                last = node
        while last.next.op == "call_function" and op_name(last.next) == "getitem" and last.next.args[0] is last.args[0]:
            last = last.next
        return last

    def _post(self, site: ResidualSite, carrier: StreamValue, coefficients: dict[str, fx.Node]) -> StreamValue:
        dtype = meta_value(site.add).dtype
        with self.builder.at(before=site.add, like=site.add):
            total: fx.Node | None = None
            for output, factor in site.outputs:
                scaled = output if factor == 1.0 else self.builder.call(torch.mul, output, factor)
                total = scaled if total is None else self.builder.call(torch.add, total, scaled)
            assert total is not None
            streams = carrier.node
            if site.carrier_scale != 1.0:
                streams = self.builder.call(torch.mul, streams, site.carrier_scale)
            y = self.streams.channels_last(total, carrier.channel)
            node = self.builder.call(
                ops.post.overload, streams, y, coefficients["post"], coefficients.get("res"), False
            )
            if meta_value(node).dtype != dtype:
                node = self.builder.method("to", node, dtype)
        return StreamValue(node, carrier.channel)

    # --- readers outside the branches --------------------------------------------------------------------------------

    def _read_out(self) -> None:
        """Replace the sums by collapsed streams for whoever still reads them, last site first."""
        last = True
        for site, state, gate in reversed(self.states):
            collapsed: fx.Node | None = None
            if site.add.users:
                collapsed = self._collapse(site, state, gate, is_end=last)
                site.add.replace_all_uses_with(collapsed)
                self.replaced[site.add] = collapsed
            self.gm.graph.erase_node(site.add)
            for node in reversed([*site.entry_path, *site.carrier_path, *site.merged]):
                if not node.users and node not in self.erased:
                    self.gm.graph.erase_node(node)
                    self.erased.add(node)
            last = False

    def _collapse(self, site: ResidualSite, state: StreamValue, gate: fx.Node | None, *, is_end: bool) -> fx.Node:
        self.builder.tags = site.add
        after = self._later(state.node, gate) if gate is not None else state.node
        with self.builder.at(after=after, like=site.add):
            if gate is not None:
                value = self.builder.call(ops.pre.overload, state.node, gate)
            elif self.options.collapse == "learned" and is_end:
                value = self._learned(state)
            else:
                kind = "mean" if self.options.collapse == "learned" else self.options.collapse
                value = self.builder.call(ops.collapse.overload, state.node, kind)
            return self.streams.channels_back(value, state.channel)

    def _learned(self, state: StreamValue) -> fx.Node:
        spec = head_spec(self.options)
        assert self.ctx.parameters is not None
        parameters = self.ctx.parameters.head(self.chain, spec, int(meta_value(state.node).shape[-1]))
        arguments = [parameters.get(name) for name in _PARAMETER_NAMES]
        node = self.builder.call(ops.coefficients.overload, state.node, *arguments, **spec.op_arguments())
        return self.builder.call(ops.pre.overload, state.node, self.streams.getitem(node, 0))


def _carrier_axis(site: ResidualSite) -> int:
    """Channel axis of the carrier: the stream's where they have one shape, else the last."""
    stream, carrier = meta_value(site.stream), meta_value(site.carrier)
    return site.channel if tuple(stream.shape) == tuple(carrier.shape) else -1


def _token_shape(state: StreamValue) -> tuple[Any, ...]:
    return tuple(meta_value(state.node).shape[:-2])
