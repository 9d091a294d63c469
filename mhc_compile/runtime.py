"""What a compiled frame calls: the artefact with the live parameters, or the error that explains why there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mhc_compile.errors import MhcError, MismatchError, UncompiledError

_RESET = "call torch._dynamo.reset() and compile the model again"


class Converted:
    """A compiled graph that appends the hyper-connection parameters to the user's arguments.

    They are looked up at every call: ``load_state_dict(assign=True)``, ``.to()`` and FSDP put other objects in their
    place. Dynamo has no guards on them, so what would make the artefact wrong is looked for here.

    Args:
        inner: the artefact; takes the graph's inputs, then the parameters.
        slots: (module, name) of each parameter, in the order of the placeholders.
        places: (owner, name, module) of each hyper-connection.
    """

    def __init__(
        self,
        inner: Callable[..., Any],
        slots: Sequence[tuple[nn.Module, str]],
        places: Sequence[tuple[nn.Module, str, nn.Module]],
    ) -> None:
        self.inner = inner
        self._slots = [(module._parameters, name) for module, name in slots]
        self._places = [(owner._modules, name, module) for owner, name, module in places]
        self._frozen = [
            (parameters, name)
            for parameters, name in self._slots
            if (value := parameters[name]) is not None and not value.requires_grad
        ]

    def __call__(self, *args: Any) -> Any:
        """Run the artefact.

        Raises:
            UncompiledError: a hyper-connection was taken off the model, or replaced.
            MismatchError: a parameter that was frozen when the graph was compiled wants a gradient.
        """
        for modules, name, module in self._places:
            if modules.get(name) is not module:
                raise dropped(name)
        if self._frozen and torch.is_grad_enabled():
            for parameters, name in self._frozen:
                if (value := parameters[name]) is not None and value.requires_grad:
                    raise MismatchError(
                        f"the hyper-connection parameter {name} was frozen when the model was compiled and wants a "
                        "gradient now: it would get none",
                        cure=_RESET,
                    )
        return self.inner(*args, *[parameters[name] for parameters, name in self._slots])


class Failed:
    """Raises the reason why a graph was not converted, at each call.

    Dynamo neither wraps nor suppresses what compiled code raises, so the user sees the error itself, and a model
    that could not be converted never runs as if it had been.
    """

    def __init__(self, error: MhcError) -> None:
        self.error = error

    def __call__(self, *args: Any) -> Any:
        """Raise the error (a fresh copy of it, so that tracebacks do not pile up)."""
        first = f"{self.error.cure}; then " if self.error.cure else ""
        cure = f"{first}call torch._dynamo.reset() before the next try"
        error = type(self.error)(self.error.what, where=self.error.where, cure=cure)
        error.report = self.error.report
        raise error from self.error.__cause__


def dropped(name: str) -> UncompiledError:
    """The error of an artefact whose hyper-connection was taken off the model, or replaced."""
    return UncompiledError(
        f"the hyper-connection {name} of this compiled model is gone (to_plain was called, or the module replaced)",
        cure=_RESET,
    )
