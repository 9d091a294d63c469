"""One class for each mistake: what happened, where in the user's code, and what to do about it.

Every error is raised as ``Class(what, where="file.py:12", cure="...")`` and reads

    what happened
      where: file.py:12
      cure:  what to do

A class whose cure is nearly always the same carries it as ``default_cure``; the one given at the raise wins.
The module imports nothing, so that everything else can import it.
"""

from __future__ import annotations

from typing import Any, ClassVar

__all__ = [
    "CarrierError",
    "CheckpointError",
    "FragmentError",
    "LayoutError",
    "MhcError",
    "MhcWarning",
    "MismatchError",
    "MissingDependencyError",
    "NoSiteError",
    "NotConvertedWarning",
    "NotLoweredWarning",
    "OptionError",
    "UncompiledError",
    "VerificationError",
    "WrappedModelError",
]


def _message(what: str, where: str | None, cure: str | None) -> str:
    lines = [what]
    if where:
        lines.append(f"  where: {where}")
    if cure:
        lines.append(f"  cure:  {cure}")
    return "\n".join(lines)


class _Told(Exception):
    """What an error and a warning have in common: the three parts, kept apart for the report and for tests."""

    default_cure: ClassVar[str | None] = None

    what: str
    where: str | None
    cure: str | None
    report: Any = None
    """The ``CompileReport`` as far as the conversion got, where there was one."""

    def __init__(self, what: str, *, where: str | None = None, cure: str | None = None) -> None:
        self.what = what
        self.where = where
        self.cure = cure if cure is not None else self.default_cure
        super().__init__(_message(what, where, self.cure))

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception pickles as cls(*args) with args = the whole message, which would lose the parts.
        return _restore, (type(self), self.what, self.where, self.cure)


def _restore(cls: type[_Told], what: str, where: str | None, cure: str | None) -> _Told:
    return cls(what, where=where, cure=cure)


class MhcError(_Told):
    """Base of every error of this package; ``what``, ``where`` (user's file:line) and ``cure`` are attributes."""


class OptionError(MhcError, ValueError):
    """An unknown option, an illegal value, or two options that contradict each other."""


class NoSiteError(MhcError):
    """The model has no residual add that could be widened and no hyper-connection that could be raised."""

    default_cure = "mhc_compile.explain(model, *inputs) lists every add that was looked at and why it was left alone"


class FragmentError(MhcError):
    """A graph break (or a per-layer compile) cuts a residual chain: the streams would have to cross the border."""

    default_cure = "compile the whole model as one graph; torch.compile(model, fullgraph=True) shows what breaks it"


class LayoutError(MhcError):
    """The residual state has a shape or a memory layout that the rewrite does not support."""


class CarrierError(MhcError):
    """The carrier of a residual chain is not a floating-point tensor."""


class UncompiledError(MhcError):
    """A converted model was about to run without its hyper-connections: called uncompiled, exported, fallen back."""

    default_cure = "call the compiled model, or drop the hyper-connections with mhc_compile.to_plain(model)"


class CheckpointError(MhcError):
    """A checkpoint and the model disagree: one says it is converted and lacks the parameters, or keys do not fit."""


class MismatchError(MhcError):
    """The hyper-connection parameters that the model already holds do not fit the options asked for."""

    default_cure = "compile with the options of the first conversion, or start again from mhc_compile.to_plain(model)"


class WrappedModelError(MhcError):
    """DDP or FSDP wrapped the model before its hyper-connection parameters existed: they would not be synchronised."""

    default_cure = "call mhc_compile.prepare(model, *example_inputs) first, then wrap it, then torch.compile it"


class MissingDependencyError(MhcError, ImportError):
    """An optional package is not installed, or is too old; the cure is the pip line."""


class VerificationError(MhcError):
    """``verify=True`` compared the rewritten graph with the original one and they differ by more than rounding."""


class MhcWarning(_Told, UserWarning):
    """Base of every warning of this package, with the same three parts as an error."""


class NotConvertedWarning(MhcWarning):
    """A graph or a chain was left as it was (``on_failure="warn"``); the model runs without those hyper-connections."""


class NotLoweredWarning(MhcWarning):
    """No kernel provider took an op, so it runs its native body: right, but slower."""
