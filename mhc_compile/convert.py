"""One captured graph through the passes: what ``backend``, ``prepare`` and ``explain`` have in common.

Nothing outside of our own copy of the graph is touched until ``Conversion.commit``.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from mhc_compile import compat
from mhc_compile.capture import ModuleMap, copy_graph, functionalize, inline_checkpoints
from mhc_compile.capture.checkpoints import checkpoint_nodes
from mhc_compile.capture.frames import enclosing_modules, is_running, is_transparent
from mhc_compile.config import Resolved
from mhc_compile.errors import FragmentError, MhcError, NoSiteError, WrappedModelError
from mhc_compile.lowering.base import FORWARD_TARGETS
from mhc_compile.model import SiteParameters, hyper_connections
from mhc_compile.passes import ORDER, PassContext, run_pass
from mhc_compile.report import CompileReport, make_report, readable, site_rows

log = logging.getLogger("mhc_compile")


@dataclasses.dataclass
class Conversion:
    """A rewritten graph, the parameters it wants, and the report."""

    gm: fx.GraphModule
    inputs: list[Any]
    """Example inputs of ``gm``: the user's, then the parameters of the sites."""
    parameters: SiteParameters
    modules: ModuleMap
    report: CompileReport
    changed: bool
    """False when the graph holds nothing of ours: compile the original."""

    def commit(self) -> None:
        """Register the new parameters on the model, guard it, tell its optimizers, and tie the artefact to it."""
        self.parameters.commit()
        for _, source in self.modules.root_sources.values():
            compat.guard_instance(source)


def convert(gm: fx.GraphModule, example_inputs: Sequence[Any], resolved: Resolved) -> Conversion:
    """Run the passes over a copy of Dynamo's graph.

    Raises:
        MhcError: the graph cannot be converted as asked; one class a reason (see ``errors``).
    """
    options = resolved.options
    if options.rewrite and options.streams > 1 and is_fake(example_inputs) and compat.under_ddp_optimizer():
        raise WrappedModelError(
            "DistributedDataParallel has cut the graph into one piece a bucket: a residual chain would cross them",
            cure="set torch._dynamo.config.optimize_ddp = False, and call mhc_compile.prepare(model, *example_inputs) "
            "before DDP wraps the model",
        )
    scope = compat.current_scope()
    copy = copy_graph(gm)
    if checkpoint_nodes(copy):
        inline_checkpoints(copy)
    functionalize(copy)
    modules = ModuleMap(copy, scope, example_inputs)
    callers = enclosing_modules(modules.roots)
    resumed = compat.is_resume_frame()
    outer = [m for m in callers if not is_transparent(m)]
    if not resumed and _is_helper() and is_running(modules.roots):
        outer = [*modules.roots, *outer]
    inside = type(outer[0]).__name__ if outer else ""
    parameters = SiteParameters(copy, modules, options)
    ctx = PassContext(
        options=options,
        modules=modules,
        parameters=parameters,
        is_parameter=modules.is_parameter,
        is_buffer=modules.is_buffer,
        break_reason=compat.break_reason(gm),
        resumed=resumed,
        inside=inside,
        callers=outer,
    )
    report = make_report(", ".join(type(root).__name__ for root in modules.roots) or "function", resolved)
    try:
        return _convert(copy, example_inputs, ctx, report, callers)
    except MhcError as error:
        error.report = report  # what was looked at before the refusal: `explain` shows it
        raise


def _is_helper() -> bool:
    """True for the frame of a method other than ``forward``."""
    translator = compat.current_translator()
    return translator is not None and translator.f_code.co_name != "forward"


def _convert(
    copy: fx.GraphModule, example_inputs: Sequence[Any], ctx: PassContext, report: CompileReport, callers: list[Any]
) -> Conversion:
    options, modules, parameters = ctx.options, ctx.modules, ctx.parameters
    assert modules is not None
    assert isinstance(parameters, SiteParameters)
    for step in ORDER:
        result = run_pass(step, copy, ctx)
        report.passes.append(result)
        report.left_alone.extend(result.refusals)
    report.raised = sum(p.changed for p in report.passes if p.name == "raise_chains")
    report.sites = site_rows(list(ctx.chains), parameters.site_names)
    report.graph = readable(copy)
    _account(report, parameters)
    parameters.check(callers)
    # Ops of ours that are there already (a stage of a converted graph) are planned and lowered like any others.
    changed = (
        bool(report.sites) or report.raised > 0 or any(node.target in FORWARD_TARGETS for node in copy.graph.nodes)
    )
    if not changed and options.rewrite and options.streams > 1 and _is_model(copy, modules, ctx):
        raise NoSiteError(_why_no_site(report), where=next((r.where for r in report.left_alone if r.where), None))
    copy.recompile()
    return Conversion(copy, [*example_inputs, *parameters.values], parameters, modules, report, changed)


def _account(report: CompileReport, parameters: SiteParameters) -> None:
    values = parameters.values
    fresh = {id(p) for *_, module in parameters.fresh for p in module.parameters()}
    report.added = {
        "tensors": len(values),
        "elements": sum(p.numel() for p in values),
        "bytes": sum(p.numel() * p.element_size() for p in values),
        "new": sum(id(p) in fresh for p in values),
    }


def _is_model(gm: fx.GraphModule, modules: ModuleMap, ctx: PassContext) -> bool:
    """True for a graph that somebody may expect to be converted: a whole module's forward with weights.

    Helper frames, optimizer steps and the pieces around a graph break are compiled as they are.
    """
    if ctx.resumed or ctx.break_reason or ctx.inside or not modules.roots:
        return False
    return any(not ref.is_buffer for ref in modules.refs.values())


def _why_no_site(report: CompileReport) -> str:
    if not report.left_alone:
        return f"{report.model} has no residual add: nothing to widen"
    reasons = sorted({refusal.reason for refusal in report.left_alone})
    return f"no residual add of {report.model} can be widened: {'; '.join(reasons[:3])}"


def tie_failure(gm: fx.GraphModule, example_inputs: Sequence[Any], failure: MhcError) -> bool:
    """Tie what stands for a failed conversion to the model it failed on; True if that model is converted already.

    Most reasons are about this very instance (its parameters, its checkpoint, its wrapper): the next one of its class
    must be looked at anew. A fragment is one for all instances, and a block may have many.
    """
    modules = ModuleMap(gm, compat.current_scope(), example_inputs)
    if not isinstance(failure, FragmentError):
        for _, source in modules.root_sources.values():
            compat.guard_instance(source)
    return any(True for root in modules.roots for _ in hyper_connections(root))


def as_error(error: Exception) -> MhcError:
    """Any failure of our passes as one of ours, so that it never becomes a silent graph break."""
    if isinstance(error, MhcError):
        return error
    wrapped = MhcError(
        f"internal error while converting the graph: {type(error).__name__}: {error}",
        cure="please report it with the model; options={'on_failure': 'warn'} compiles the model as it is",
    )
    wrapped.__cause__ = error
    return wrapped


def is_fake(inputs: Sequence[Any]) -> bool:
    """True when Dynamo handed over fake tensors, as DDP's graph splitter does."""
    from torch._subclasses import FakeTensor

    return any(isinstance(value, FakeTensor) for value in inputs if isinstance(value, torch.Tensor))
