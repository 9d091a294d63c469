"""What every semantic op has in common: its record, its compute dtype and its freedom from autocast.

An op is a plain PyTorch function (`native`, the meaning), a hand-written backward of the same kind
(`native_backward`: a custom op's body runs below autograd, so autograd cannot be asked there), and two custom ops
that carry them through graphs. What passes put into graphs behind autograd needs no backward (`ForwardOp`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.library import CustomOpDef

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class ForwardOp:
    """One word of the vocabulary, the custom op `mhc::<name>`. What is this and no `SemanticOp` has no gradient: only
    graphs behind autograd hold it."""

    name: str
    native: Callable[..., Any]
    definition: CustomOpDef

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the custom op."""
        return self.overload(*args, **kwargs)

    @property
    def overload(self) -> torch._ops.OpOverload:
        """`torch.ops.mhc.<name>.default`, the target of graph nodes."""
        return getattr(torch.ops.mhc, self.name).default


@dataclass(frozen=True)
class SemanticOp(ForwardOp):
    """One with its autograd formula."""

    native_backward: Callable[..., Any]
    backward_definition: CustomOpDef

    @property
    def backward_overload(self) -> torch._ops.OpOverload:
        """`torch.ops.mhc.<name>_backward.default`."""
        return getattr(torch.ops.mhc, f"{self.name}_backward").default


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 where any floating argument is float64, else float32. Raises TypeError for a non-floating tensor."""
    for tensor in tensors:
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise TypeError(f"hyper-connection ops take floating tensors, got {tensor.dtype}")
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run `function` with autocast off: the dispatcher passes a custom op's body on with autocast still enabled, and a
    coefficient computed in bf16 there would differ from the compiled one."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with contextlib.ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return wrapper


def unneeded(like: Tensor) -> Tensor:
    """The empty stand-in for a gradient nobody asked for (a custom op's outputs are never None)."""
    return like.new_empty(0)


def keep(needed: bool, gradient: Tensor) -> Tensor | None:
    """The gradient where autograd wants it, None instead of its stand-in."""
    return gradient if needed else None


def check_streams(streams: Tensor) -> tuple[int, int]:
    """(n, C) of a state [..., n, C]; ValueError for fewer than two dimensions."""
    if streams.dim() < 2:
        raise ValueError(f"a stream state is [..., n, C], got {tuple(streams.shape)}")
    return streams.shape[-2], streams.shape[-1]
