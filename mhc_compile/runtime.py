"""What a compiled frame calls: the artefact with the live parameters, or the error that explains why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from mhc_compile.errors import MhcError, UncompiledError


class Converted:
    """A compiled graph that appends the hyper-connection parameters to the user's arguments.

    They are looked up at every call: ``load_state_dict(assign=True)``, ``.to()`` and FSDP put other objects in their
    place.
    """

    def __init__(self, inner: Callable[..., Any], slots: Sequence[tuple[nn.Module, str]]) -> None:
        self.inner = inner
        self._slots = [(module._parameters, name) for module, name in slots]

    def __call__(self, *args: Any) -> Any:
        """Run the artefact."""
        try:
            values = [parameters[name] for parameters, name in self._slots]
        except KeyError as error:
            raise UncompiledError(
                f"the hyper-connection parameter {error} is gone from the model",
                cure="call torch._dynamo.reset() and compile the model again",
            ) from None
        return self.inner(*args, *values)


class Failed:
    """Raises the reason why a graph was not converted, at each call.

    Dynamo neither wraps nor suppresses what compiled code raises, so the user sees the error itself, and a model
    that could not be converted never runs as if it had been.
    """

    def __init__(self, error: MhcError) -> None:
        self.error = error

    def __call__(self, *args: Any) -> Any:
        """Raise the error (a fresh copy of it, so that tracebacks do not pile up)."""
        reset = "call torch._dynamo.reset() before the next try"
        cure = f"{self.error.cure}; then {reset}" if self.error.cure else reset
        error = type(self.error)(self.error.what, where=self.error.where, cure=cure)
        raise error from self.error.__cause__
