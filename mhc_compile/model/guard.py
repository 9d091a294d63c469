"""A converted model must not silently run without its hyper-connections.

Calling it uncompiled (``model(x)``, ``generate()`` on the wrapper, a frame that Dynamo gave up on, ``torch.export``)
or compiled by another backend would run the user's own forward, which knows nothing of them. A forward-pre-hook on the
modules that own the adds refuses that. It costs no recompile: Dynamo does not guard on hooks that were added after it
looked, and while it traces, ``torch.compiler.is_compiling()`` is true.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mhc_compile import compat
from mhc_compile.errors import FragmentError, UncompiledError

_local = threading.local()


_OTHER_BACKEND = (
    "a converted model is being compiled by another backend, which would leave its hyper-connections out: compile it "
    "with backend='mhc', or call it within `with mhc_compile.plain():`"
)


class PlainRunGuard:
    """The hook. A class, so that a model that carries it can be copied and pickled."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Refuse a plain run; let a trace and the plain() context pass."""
        if torch.compiler.is_compiling():
            if compat.is_exporting():
                _refuse(module, "is being exported")
            if not compat.compiled_by_torch() or getattr(_local, "plain", False):
                return
            # Back to eager, where this hook runs again; with fullgraph=True this text is the error.
            torch._dynamo.graph_break(msg=_OTHER_BACKEND)
        if not getattr(_local, "plain", False):
            _refuse(module, "was called uncompiled")


def _refuse(module: nn.Module, how: str) -> None:
    if compat.is_data_parallel(module):
        raise FragmentError(
            f"a {type(module).__name__} of a converted model is wrapped or sharded on its own: it would be one graph, "
            "and the streams would have to cross its border",
            cure="after mhc_compile.prepare(model, *example_inputs) wrap or shard the whole model only: "
            "fully_shard(model), and torch._dynamo.config.optimize_ddp = False for DDP",
        )
    raise UncompiledError(
        f"a converted model {how}: {type(module).__name__} would run without its hyper-connections",
        cure="call the compiled model (model.compile(backend='mhc') also covers generate()); if Dynamo fell back to "
        "eager, TORCH_LOGS=recompiles,graph_breaks says why (a TorchDispatchMode around the call is one reason, "
        "another backend than 'mhc' too); for the plain model on purpose use "
        "`with mhc_compile.plain():` or mhc_compile.to_plain(model)",
    )


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Within it, a converted model may run uncompiled, as the plain model that it was (this thread only)."""
    before = getattr(_local, "plain", False)
    _local.plain = True
    try:
        yield
    finally:
        _local.plain = before


def install(module: nn.Module) -> RemovableHandle | None:
    """Put the guard on a module, once; returns its handle, None if the module had it."""
    if any(isinstance(hook, PlainRunGuard) for hook in module._forward_pre_hooks.values()):
        return None
    # When a frame falls back to eager, Dynamo goes on to compile what it calls: the hook as a frame of its own would
    # find that it is being compiled, and stay silent.
    compat.never_compile_alone(PlainRunGuard.__call__)
    return module.register_forward_pre_hook(PlainRunGuard())


def install_below(root: nn.Module) -> RemovableHandle | None:
    """Put the guard on the first submodule with parameters of its own. On the root of a compiled frame it would fire:
    the hooks of that one run outside of the frame."""
    for module in root.modules():
        if module is not root and any(True for _ in module.parameters(recurse=False)):
            return install(module)
    return None


def remove(model: nn.Module) -> None:
    """Take every guard off a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, PlainRunGuard):
                del module._forward_pre_hooks[key]
