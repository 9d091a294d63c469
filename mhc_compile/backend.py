"""``torch.compile(model, backend="mhc")``: the whole pipeline on one screen.

Registered as an entry point of the group ``torch_dynamo_backends``; torch imports this module when the backend is
first asked for. Failures never leave the backend as exceptions: Dynamo would turn some of them into a graph break and
run the model without its hyper-connections. What is returned instead raises the error when it is called.
"""

from __future__ import annotations

import collections
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from mhc_compile import compat
from mhc_compile.config import Resolved, resolve
from mhc_compile.convert import Conversion, as_error, convert, tie_failure
from mhc_compile.errors import MhcError, NotConvertedWarning
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches, source_hash
from mhc_compile.lowering.kernels import register_kernels
from mhc_compile.lowering.mlir import compile_inference
from mhc_compile.lowering.side import split_coefficients
from mhc_compile.passes.recompute import PLAN_KEY, inductor_settings
from mhc_compile.report import CompileReport
from mhc_compile.runtime import Converted, Failed
from mhc_compile.scheduler.main_stream import raise_forks
from mhc_compile.scheduler.schedule import ScheduleLog, schedule_patches
from mhc_compile.verify import verify

log = logging.getLogger("mhc_compile")

reports: collections.deque[CompileReport] = collections.deque(maxlen=32)
"""The reports of the latest conversions of this process, newest last."""


def mhc(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend: capture, raise, find, widen, then inductor with our passes.

    Args:
        gm: Dynamo's torch-level graph, parameters as placeholders; not edited.
        example_inputs: real tensors, ``nn.Parameter`` among them, and sizes.
        mode, options: as given to ``torch.compile``; see ``config.Options``.

    Returns:
        A callable with the graph's signature. If the graph cannot be converted, one that raises the reason
        (``on_failure="raise"``), or the graph compiled as it is, with a warning (``on_failure="warn"``; a model that
        holds hyper-connections never runs without them, so that one raises too).
    """
    try:
        resolved = resolve(options, mode)
    except MhcError as error:
        return Failed(error)
    try:
        conversion = convert(gm, example_inputs, resolved)
        if not conversion.changed:
            _warn_of_pieces(conversion)
            return _compile(gm, example_inputs, resolved, LoweringLog())
        if resolved.options.verify:
            verify(gm, example_inputs, conversion, resolved.options)
        lowering = LoweringLog()
        inner = _compile(conversion.gm, conversion.inputs, resolved, lowering, conversion.report.schedule)
        conversion.commit()
        _publish(conversion, lowering)
        _warn_of_the_rest(conversion)
        return Converted(inner, conversion.parameters.slots, conversion.parameters.places)
    except compat.passthrough_exceptions():
        raise
    except Exception as error:  # every other exception is ours to report: see the module docstring
        failure = as_error(error)
        converted_before = tie_failure(gm, example_inputs, failure)
        if resolved.options.on_failure == "raise" or converted_before:
            return Failed(failure)
        warnings.warn(NotConvertedWarning(failure.what, where=failure.where, cure=failure.cure), stacklevel=2)
        return _compile(gm, example_inputs, resolved, LoweringLog())


def _warn_of_pieces(conversion: Conversion) -> None:
    """A piece of a broken model may be compiled as it is, but not in silence if it held residual adds, or may have."""
    adds = [refusal for refusal in conversion.report.left_alone if refusal.what == "residual add"]
    pieces = [refusal for refusal in conversion.report.left_alone if refusal.what == "piece"]
    if pieces:
        warnings.warn(
            NotConvertedWarning(
                f"{pieces[0].reason}; what is added between the pieces is in no graph and stays as it is",
                cure="torch.compile(model, fullgraph=True) shows what breaks the graph",
            ),
            stacklevel=3,
        )
    elif adds:
        warnings.warn(
            NotConvertedWarning(
                f"a piece of the model around a graph break has no residual chain of its own: {adds[0].reason}",
                where=adds[0].where or None,
                cure="torch.compile(model, fullgraph=True) shows what breaks the graph",
            ),
            stacklevel=3,
        )


def _warn_of_the_rest(conversion: Conversion) -> None:
    """Half a model (a pre-norm tower beside a post-norm one) is not what somebody may take it for."""
    report = conversion.report
    rest = [refusal for refusal in report.left_alone if refusal.reason.startswith("post-norm")]
    if rest and report.sites:
        warnings.warn(
            NotConvertedWarning(
                f"{len(report.sites)} residual adds of {report.model} are widened, and {len(rest)} are left: "
                f"{rest[0].reason}",
                where=rest[0].where or None,
                cure="mhc_compile.explain(model, *inputs) lists all of them",
            ),
            stacklevel=3,
        )


def _compile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    resolved: Resolved,
    lowering: LoweringLog,
    schedule: ScheduleLog | None = None,
) -> Callable[..., Any]:
    """Hand a graph to what the options ``compiler`` and ``lowering`` name."""
    options = resolved.options
    if options.compiler != "inductor":
        artefact: Callable[..., Any] = compat.lookup_backend(options.compiler)(gm, list(inputs))
        return artefact
    if options.lowering == "mlir":
        return compile_inference(gm, inputs, lowering)
    patches = config_patches(options, lowering, gm.meta.get(PLAN_KEY, ""))
    settings = {**inductor_settings(gm, options), **resolved.inductor, **patches}
    if settings.get("emulate_precision_casts"):
        compat.keep_rounding_in_cpp()
    register_kernels(next((one.device for one in inputs if isinstance(one, torch.Tensor)), None))
    if options.schedule == "off" or schedule is None:
        return compat.inductor_compile(gm, inputs, settings)
    captured = options.schedule == "captured"
    settings = schedule_patches(settings, schedule, split_coefficients, source_hash(), captured)
    return compat.inductor_compile(gm, inputs, settings, raise_forks)


def _publish(conversion: Conversion, lowering: LoweringLog) -> None:
    report = conversion.report
    report.log = lowering
    reports.append(report)
    log.info("%s", report)
    log.debug("%s", report.graph)
    compat.trace_artifact("mhc_compile_report", report.to_json())
    compat.trace_artifact("mhc_compile_graph", report.graph)
