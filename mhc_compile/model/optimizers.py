"""Optimizers that were made before the conversion learn of the new parameters.

A parameter is appended to a group that exists (an added group would break LR schedulers, which keep one base rate a
group), in the group without weight decay if there is one, and at the place that it has in ``model.parameters()``: so a
resumed run, whose optimizer is made after the conversion, finds its state in the same order.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

log = logging.getLogger("mhc_compile")


def live_optimizers() -> list[Optimizer]:
    """Every optimizer of the process. ``type`` and not ``isinstance``: the latter wakes lazy proxies."""
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]


def adopt(model: nn.Module, parameters: Sequence[nn.Parameter], optimizers: Iterable[Optimizer] | None = None) -> int:
    """Append ``parameters`` of ``model`` to the optimizers that hold other parameters of it; returns how many did.

    Called at conversion, before the first backward, so that gradient scalers and clipping see every gradient.
    """
    fresh = {id(p) for p in parameters}
    names = {id(p): name for name, p in model.named_parameters()}
    adopted = 0
    for optimizer in live_optimizers() if optimizers is None else optimizers:
        groups = getattr(optimizer, "param_groups", None) or []
        held = {id(p) for group in groups for p in group["params"]}
        if not held & (names.keys() - fresh):
            continue
        missing = [p for p in model.parameters() if id(p) in fresh and id(p) not in held]
        if not missing:
            continue
        group = _group_for(groups, names)
        for parameter in missing:
            _insert(group, parameter, list(names), names)
        adopted += 1
        log.info(
            "%d hyper-connection parameters joined a group of %d in the %s (weight_decay=%s)",
            len(missing),
            len(group["params"]) - len(missing),
            type(optimizer).__name__,
            group.get("weight_decay"),
        )
    return adopted


def _group_for(groups: list[dict[str, Any]], names: dict[int, str]) -> dict[str, Any]:
    ours = [group for group in groups if any(id(p) in names for p in group["params"])]
    return next((group for group in ours if group.get("weight_decay", 0) == 0), ours[0])


def _insert(group: dict[str, Any], parameter: nn.Parameter, order: list[int], names: dict[int, str]) -> None:
    """Put a parameter where ``model.parameters()`` has it, relative to those that the group holds already."""
    rank = {identity: i for i, identity in enumerate(order)}
    own = rank[id(parameter)]
    held = group["params"]
    place = next((i for i, p in enumerate(held) if rank.get(id(p), -1) > own), len(held))
    held.insert(place, parameter)
    if "param_names" in group:
        group["param_names"].insert(place, names[id(parameter)])


class StepHook:
    """Second line: an optimizer that the scan could not see (built in another thread) adopts before its step.

    Its first gradient of an adopted parameter is dropped: a gradient scaler has not unscaled it.
    """

    def __init__(self) -> None:
        self.models: list[tuple[Any, Any]] = []

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for reference, parameters in self.models:
            model = reference()
            if model is not None and adopt(model, parameters(), [optimizer]):
                for parameter in parameters():
                    parameter.grad = None


_step_hook: StepHook | None = None


def watch(model: nn.Module) -> None:
    """Register the second line for a converted model (a global, public hook of torch.optim, registered once)."""
    import weakref

    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from mhc_compile.model.hyper_connection import hyper_connections

    global _step_hook
    if _step_hook is None:
        _step_hook = StepHook()
        register_optimizer_step_pre_hook(_step_hook)
    reference = weakref.ref(model)

    def parameters() -> list[nn.Parameter]:
        owner = reference()
        return [] if owner is None else [p for _, hc in hyper_connections(owner) for p in hc.parameters()]

    _step_hook.models = [(r, p) for r, p in _step_hook.models if r() is not None and r() is not model]
    _step_hook.models.append((reference, parameters))


__all__ = ["adopt", "live_optimizers", "watch"]
