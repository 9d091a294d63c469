"""Which modules are being called right now, outside of the frame that Dynamo compiles.

A graph break inside a loop makes Dynamo skip the outer frame and compile each block's ``forward`` as an innocent frame
of its own: nothing in the graph says so, but the outer module's call is on Python's stack.
"""

from __future__ import annotations

import inspect

from torch import nn


def enclosing_modules(roots: list[nn.Module]) -> list[nn.Module]:
    """Modules on the call stack that hold one of ``roots`` as a proper submodule, innermost first.

    Wrappers that only pass the call on (a compiled module, DDP) count as what they are: callers tell them apart.
    """
    found: list[nn.Module] = []
    frame = inspect.currentframe()
    while frame is not None:
        # every frame of a module call has its module as `self`; forward() of the user's classes too
        module = frame.f_locals.get("self") if frame.f_code.co_varnames[:1] == ("self",) else None
        if issubclass(type(module), nn.Module) and not any(module is other for other in (*found, *roots)):
            assert isinstance(module, nn.Module)
            submodules = {id(child) for child in module.modules()}
            if any(id(root) in submodules for root in roots):
                found.append(module)
        frame = frame.f_back
    return found


def is_running(roots: list[nn.Module]) -> bool:
    """True when a method of one of ``roots`` is running uncompiled and has called the frame that Dynamo compiles.

    That is what is left of a ``forward`` that Dynamo has given up: the helper methods it calls are compiled one by one.
    """
    frame = inspect.currentframe()
    while frame is not None:
        code = frame.f_code
        first = code.co_varnames[:1] == ("self",) and not frame.f_globals.get("__name__", "").startswith("torch.")
        if first and any(frame.f_locals.get("self") is root for root in roots):
            return True
        frame = frame.f_back
    return False


def is_transparent(module: nn.Module) -> bool:
    """True for a wrapper around one whole model: ``torch.compile``'s, DataParallel's and the like."""
    return hasattr(module, "_orig_mod") or type(module).__name__ in ("DistributedDataParallel", "DataParallel")
