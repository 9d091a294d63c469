"""Find the residual sites of a graph and the chains they form: data only, nothing is edited.

A **site** is an add of two equally shaped activations, one of which (the *carrier*) reaches the other through a
*branch* that holds at least one weighted operation. The finder walks the graph once in order. For each value it knows
the *trace*: the last residual sum that it is a linear image of, and whether a norm or a non-linear operation lies in
between. So a site's parent is the trace of its stream, and chains are paths of the resulting forest. Names of modules,
variables or classes decide nothing.

Cost: linear in the nodes. The walk back from an add is bounded by the position of its carrier, so that only the nodes
of the branch are visited.
"""

from __future__ import annotations

import fnmatch

import torch
from torch import fx

from mhc_compile import compat, ops
from mhc_compile.capture.graph import meta_value, qualified_module, user_line
from mhc_compile.capture.mutation import INPLACE_ADDS, is_write, op_name, written
from mhc_compile.passes.base import PassContext, PassResult, Refusal
from mhc_compile.passes.chains import assemble
from mhc_compile.passes.roles import UNARY_LINEAR, Roles, channel_axis, summands
from mhc_compile.passes.sites import ResidualSite
from mhc_compile.passes.traces import Trace, follow

_ZEROS = frozenset("zeros zeros_like new_zeros".split())


def find_sites(gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Fill ``ctx.chains``; ``changed`` is the number of sites in chains that can be widened."""
    switched_off = _why_off(gm, ctx)
    if switched_off:
        return PassResult("find_sites", notes=[switched_off])
    finder = _Finder(gm, ctx)
    finder.walk()
    chains, refusals = assemble(list(finder.sites.values()), ctx)
    ctx.chains = chains
    result = PassResult("find_sites", changed=sum(len(chain.sites) for chain in chains))
    result.refusals = finder.refusals + refusals
    for chain in chains:
        note = f"chain {chain.index}: {len(chain.sites)} sites from {chain.sites[0].module or 'the root'}"
        still = sum(not site.learns for site in chain.sites)
        result.notes.append(f"{note}, {still} of them without gradients (no_grad)" if still else note)
    return result


def _why_off(gm: fx.GraphModule, ctx: PassContext) -> str:
    """Why the plain adds of a graph are not looked at; empty if they are."""
    if not ctx.options.rewrite:
        return "switched off by option rewrite"
    if ctx.options.streams == 1:
        return "one stream is the model as it was"
    if any(node.target is ops.post.overload for node in gm.graph.nodes):
        return "the graph has hyper-connections already; they are kept as they are and nothing is widened beside them"
    return ""


class _Finder:
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.gm, self.ctx = gm, ctx
        self.roles = Roles(gm, ctx.is_parameter, ctx.is_buffer)
        self.order = {node: i for i, node in enumerate(gm.graph.nodes)}
        self.sites: dict[fx.Node, ResidualSite] = {}
        self.traces: dict[fx.Node, Trace] = {}
        self.live = _live(gm)
        self.refusals: list[Refusal] = []
        self.written = written(gm)
        self.from_zero: set[fx.Node] = set()
        """First sums of streams that begin as zeros."""
        switches = [n for n in gm.graph.nodes if op_name(n) == "_set_grad_enabled"]
        self.gradients = not switches[0].args[0] if switches else torch.is_grad_enabled()

    def walk(self) -> None:
        for node in self.gm.graph.nodes:
            if op_name(node) == "_set_grad_enabled":
                self.gradients = bool(node.args[0])
            if node.op not in ("call_function", "call_method"):
                continue
            if op_name(node) == "_transformer_encoder_layer_fwd":
                self._refuse(
                    node,
                    "a fused encoder layer hides its residual adds; switch it off with "
                    "torch.backends.mha.set_fastpath_enabled(False)",
                )
            site = self._read_site(node)
            if site is not None:
                self._add(site)
            else:
                trace = self._trace(node)
                if trace is not None:
                    self.traces[node] = trace

    # --- one add -----------------------------------------------------------------------------------------------------

    def _read_site(self, node: fx.Node) -> ResidualSite | None:
        operands = summands(node)
        if operands is None:
            return None
        (a, fa), (b, fb) = operands
        for (carrier, c_factor), (output, o_factor) in (((a, fa), (b, fb)), ((b, fb), (a, fa))):
            site = self._match(node, carrier, output) or self._match_parallel(node, carrier, output)
            if site is None:
                continue
            if not _same_shape(meta_value(carrier), meta_value(node)):
                continue  # a bias or a gate that is broadcast: nothing that could be a stream
            site.carrier_scale *= c_factor  # a parallel site starts with that of its first add
            site.outputs = [(out, factor * c_factor) for out, factor in site.outputs[:-1]] + [(output, o_factor)]
            reason = self._why_not(node, site, output)
            if reason:
                self._refuse(node, reason)
                return None
            return site
        return None

    def _match(self, node: fx.Node, carrier: fx.Node, output: fx.Node) -> ResidualSite | None:
        if output in self.roles.constant:
            return None
        names = self.roles.strip(carrier, lambda n: n in self.sites)
        ancestors = self._ancestors(output, min(self.order[n] for n in names))
        stream = next((n for n in names if n in ancestors), None)
        if stream is None:
            return None
        if stream in self.roles.constant and (output in self.traces or output in self.from_zero):
            return None  # learned positions that are added to a stream which has read them before
        branch = self._branch(stream, ancestors)
        if branch is None:
            return None
        path = names[: names.index(stream)][::-1]
        site = self._site(node, stream, carrier, output, branch, path)
        site.from_constant = stream in self.roles.constant
        return site

    def _match_parallel(self, node: fx.Node, carrier: fx.Node, output: fx.Node) -> ResidualSite | None:
        """``(x + attn) + mlp`` where the mlp reads x, and nobody else reads the first sum: one site, two branches."""
        first = self.sites.get(carrier)
        if first is None or len(carrier.users) != 1:
            return None
        ancestors = self._ancestors(output, self.order[first.stream])
        branch = self._branch(first.stream, ancestors) if first.stream in ancestors else None
        if branch is None:
            return None
        site = self._site(node, first.stream, first.carrier, output, branch | first.branch, first.carrier_path)
        site.outputs, site.carrier_scale = [*first.outputs, (output, 1.0)], first.carrier_scale
        site.merged = [*first.merged, carrier]
        return site

    def _site(
        self,
        node: fx.Node,
        stream: fx.Node,
        carrier: fx.Node,
        output: fx.Node,
        branch: set[fx.Node],
        path: list[fx.Node],
    ) -> ResidualSite:
        inputs = {arg for inner in branch for arg in inner.all_input_nodes}
        parameters = sorted(
            (n for n in inputs if n.op == "placeholder" and n in self.roles.weight), key=self.order.__getitem__
        )
        site = ResidualSite(node, stream, carrier, [(output, 1.0)], branch, parameters, carrier_path=path)
        inner = sorted(branch, key=self.order.__getitem__)
        site.images = frozenset(self.roles.images(stream, inner) - {stream, output})
        axis = channel_axis(stream, branch, self.roles)
        site.channel, site.channels_known = axis or -1, axis is not None
        site.kind = _kind(branch)
        site.learns = self.gradients
        if self.ctx.modules is not None:
            site.owner = self.ctx.modules.owner(node, parameters)
        return site

    def _ancestors(self, node: fx.Node, first: int) -> set[fx.Node]:
        """``node`` and what it is computed from, no further back than position ``first``."""
        found, queue = {node}, [node]
        while queue:
            for arg in queue.pop().all_input_nodes:
                if arg not in found and self.order[arg] >= first:
                    found.add(arg)
                    queue.append(arg)
        return found

    def _branch(self, stream: fx.Node, ancestors: set[fx.Node]) -> set[fx.Node] | None:
        """What lies between ``stream`` and the add; None if no weighted operation does."""
        reached: set[fx.Node] = set()
        weighted = False
        for node in sorted(ancestors, key=self.order.__getitem__):
            if node is not stream and any(arg is stream or arg in reached for arg in node.all_input_nodes):
                reached.add(node)
                weighted = weighted or self.roles.is_weighted(node)
        return reached if weighted else None

    def _why_not(self, node: fx.Node, site: ResidualSite, output: fx.Node) -> str:
        """Why an add that is residual by data flow is none of ours; empty if it is."""
        options = self.ctx.options
        carrier, branch = meta_value(site.carrier), meta_value(output)
        if not (_same_shape(carrier, branch) and _same_shape(carrier, meta_value(node))):
            return f"carrier {_shape(carrier)} and branch {_shape(branch)} differ in shape: a broadcast is no site"
        if not carrier.is_floating_point() or not branch.is_floating_point():
            return f"the carrier is {carrier.dtype}; hyper-connections mix floating-point streams"
        if compat.is_dtensor(carrier):
            return "the stream is a DTensor (sequence parallel), which the site operations have no sharding rule for"
        if op_name(node) in INPLACE_ADDS:
            return "the add writes in place into a tensor that is an input or has another name; write x = x + f(x)"
        if node not in self.live:
            return "nothing that the graph returns reads the sum"
        if site.from_constant and self._is_zero(site.stream):
            self.from_zero.add(node)
            return "the stream is zero there, which leaves nothing to mix; it begins behind this add"
        if any(op_name(n) == "detach" for n in self.roles.strip(output, lambda n: n in self.sites)):
            return "the branch is detached from the gradient (a straight-through estimator), so it has nothing to learn"
        write = next(
            (self.written[n] for n in (site.stream, site.carrier, *site.carrier_path) if n in self.written), None
        )
        if write is not None:
            return f"the stream is written in place at {user_line(write) or write.name}, which no copy of it would see"
        if self._is_same_stream(site, output):
            return "skip connection: both operands are states of the same stream, each is read collapsed"
        if self._is_addition_from_outside(site, output):
            return "an addition from outside to another stream, which goes on behind it"
        module = site.module
        if options.include and not any(fnmatch.fnmatch(module, glob) for glob in options.include):
            return "not included by option include"
        if any(fnmatch.fnmatch(module, glob) for glob in options.exclude):
            return "excluded by option exclude"
        if not isinstance(carrier.shape[site.channel], int):
            return "the channel size is dynamic; mark that dimension static (torch._dynamo.mark_static)"
        return ""

    def _is_zero(self, node: fx.Node) -> bool:
        """True for a constant that is written as zeros, in whatever layout."""
        while op_name(node) in UNARY_LINEAR and node.args and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return op_name(node) in _ZEROS

    def _is_same_stream(self, site: ResidualSite, output: fx.Node) -> bool:
        trace = self.traces.get(output)
        if trace is None or trace.barrier is not None:
            return False
        state: ResidualSite | None = self.sites.get(trace.root)
        while state is not None:
            if site.stream in (state.stream, state.add) or site.stream in state.entry_path:
                return True
            state = state.parent
        return False

    def _is_addition_from_outside(self, site: ResidualSite, output: fx.Node) -> bool:
        """True when the "branch" is a stream of its own that goes on through this add, and the carrier joins it.

        That is so when the stream begins without the carrier (a condition or a memory that its branches have read),
        or when the carrier was added to it before (the same condition in front of every layer). A branch that ends in
        a residual add of its own begins with a norm or a projection of the carrier, and is none of these.
        """
        trace = self.traces.get(output)
        state = self.sites.get(trace.root) if trace is not None and trace.barrier is None else None
        if state is None:
            return False
        while state.parent is not None:
            state = state.parent
        head = state.stream
        before = self._ancestors(head, self.order[site.stream])
        if site.stream not in before:
            return True
        return head in self.roles.images(site.stream, sorted(before, key=self.order.__getitem__))

    def _add(self, site: ResidualSite) -> None:
        for merged in site.merged:
            self.sites.pop(merged, None)
            self.traces.pop(merged, None)
        trace = self.traces.get(site.stream)
        if trace is not None:
            if trace.barrier is None:
                site.parent = self.sites.get(trace.root)
                site.entry_path = sorted(trace.path, key=self.order.__getitem__)
            else:
                site.after_norm, site.norm_parent = trace.barrier, self.sites.get(trace.root)
                site.cut_by = trace.barrier_role
        self.sites[site.add] = site
        if site.add not in self.written:
            self.traces[site.add] = Trace(site.add)

    # --- traces ------------------------------------------------------------------------------------------------------

    def _trace(self, node: fx.Node) -> Trace | None:
        if node in self.written:
            return None
        return follow(node, self.traces, self.roles, per_stream=self.ctx.options.post_norm == "per_stream")

    def _refuse(self, node: fx.Node, reason: str) -> None:
        module = qualified_module(node)
        self.refusals.append(Refusal("residual add", reason, user_line(node), module))


def _live(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes that an output or a write depends on."""
    found: set[fx.Node] = set()
    for node in reversed(gm.graph.nodes):
        if node.op == "output" or is_write(node) or any(user in found for user in node.users):
            found.add(node)
    return found


def _kind(branch: set[fx.Node]) -> str:
    names = {op_name(node) for node in branch}
    if names & {"scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward"}:
        return "attention"
    if "softmax" in names and names & {"matmul", "bmm", "baddbmm", "einsum"}:
        return "attention"
    return "mlp" if names & {"linear", "addmm", "matmul", "bmm", "_grouped_mm", "grouped_mm"} else "mixer"


def _same_shape(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dim() == b.dim() and all(compat.statically_equal(x, y) for x, y in zip(a.shape, b.shape, strict=True))


def _shape(value: torch.Tensor) -> str:
    return "[" + ", ".join(str(s) for s in value.shape) + "]"
