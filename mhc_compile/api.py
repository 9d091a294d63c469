"""``prepare`` and ``explain``: the conversion without the compilation.

Both let Dynamo trace the model with a backend that converts the graph and then leaves, so nothing of the model runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from mhc_compile import compat
from mhc_compile.config import Resolved, resolve
from mhc_compile.convert import Conversion, as_error, convert
from mhc_compile.errors import FragmentError, MhcError, OptionError
from mhc_compile.model.state import wrappers
from mhc_compile.report import CompileReport, make_report


def prepare(model: nn.Module, *example_inputs: Any, **options: Any) -> nn.Module:
    """Give a model its hyper-connection parameters before the first compiled call, without running it.

    Needed before DDP or FSDP wraps it, before an optimizer state is loaded, and for a model on the meta device. A
    later ``torch.compile(model, backend="mhc", options=...)`` with the same options uses them.

    Args:
        model: the module, or its compiled wrapper.
        example_inputs: positional arguments of its forward; a dictionary as the last one gives keyword arguments.
            Real, fake or meta tensors.
        options: as ``torch.compile(..., options=...)``.

    Returns:
        The same model.

    Raises:
        MhcError: as the compiled model would raise; the model is unchanged then.
    """
    trace(model, example_inputs, options, commit=True)
    return model


def explain(model: nn.Module, *example_inputs: Any, **options: Any) -> CompileReport:
    """Say what the backend would do with a model: sites, chains, what is left alone and why, parameters, passes.

    Nothing is compiled, run or changed. Arguments as ``prepare``; a model that cannot be converted gives a report
    whose ``error`` says why.
    """
    resolved = _resolved(options)
    try:
        return trace(model, example_inputs, options, commit=False).report
    except MhcError as error:
        report: CompileReport = error.report or make_report(type(model).__name__, resolved)
        report.error = str(error)
        return report


def _resolved(options: dict[str, Any]) -> Resolved:
    """The options of a call; OptionError for a tensor among them, which was meant as an input."""
    for name, value in options.items():
        if isinstance(value, torch.Tensor):
            raise OptionError(
                f"{name!r} is a tensor, not an option",
                cure=f"give inputs that have names as a dictionary in the last place: (model, {{{name!r}: ...}})",
            )
    return resolve(options or None, None)


def trace(model: nn.Module, inputs: Sequence[Any], options: dict[str, Any], *, commit: bool) -> Conversion:
    """Convert the graph that Dynamo makes of a call; ``commit`` registers the parameters. Raises MhcError."""
    resolved = _resolved(options)
    *wrapped, model = wrappers(model)
    done = compat.capture_done()
    outcome: list[Conversion | MhcError] = []

    def capture(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        try:
            conversion = convert(gm, example_inputs, resolved)
            if commit:
                conversion.parameters.check(wrapped)
                conversion.parameters.commit()
            outcome.append(conversion)
        except compat.passthrough_exceptions():
            raise
        except Exception as error:  # reported by the caller, outside of Dynamo
            outcome.append(as_error(error))
        raise done

    args, kwargs = split_inputs(model, inputs)
    compiled = torch.compile(model, backend=capture, fullgraph=True, dynamic=False)
    try:
        with compat.keep_sizes():  # or the first real call with other sizes would be compiled for dynamic ones
            compiled(*args, **kwargs)
    except done:
        pass
    except compat.unsupported_exceptions() as error:
        reason = str(error).splitlines()[0]
        raise FragmentError(f"the model is not one graph: {reason}", where=_break_place(error)) from error
    except compat.tracing_exceptions() as error:
        reason = str(error).splitlines()[0]
        raise MhcError(
            f"the model fails while it is traced: {reason}",
            where=_break_place(error),
            cure="call it once without torch.compile on the same inputs; what is wrong there is wrong here",
        ) from error
    finally:
        # Dynamo keeps each backend that it has seen, and ours would keep the model.
        results = [*outcome]
        outcome.clear()
        wrapped.clear()
    if not results:
        raise FragmentError("Dynamo captured no graph of the model", cure="check that the inputs reach its layers")
    result = results[-1]
    if isinstance(result, MhcError):
        raise result
    return result


def split_inputs(model: nn.Module, inputs: Sequence[Any]) -> tuple[list[Any], dict[str, Any]]:
    """A dictionary in the last place holds keyword arguments if forward knows their names."""
    if not inputs or not isinstance(inputs[-1], Mapping) or not all(isinstance(key, str) for key in inputs[-1]):
        return list(inputs), {}
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    if takes_any or inputs[-1].keys() <= names:
        return list(inputs[:-1]), dict(inputs[-1])
    return list(inputs), {}


def _break_place(error: BaseException) -> str | None:
    lines = [line.strip() for line in str(error).splitlines() if line.strip().startswith("File ")]
    return lines[-1] if lines else None
