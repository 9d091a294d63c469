"""Optimizers that were made before the conversion learn of the new parameters.

A new parameter goes where its nearest relative goes: every optimizer that holds the relative adopts it. With one
optimizer that is the one; with one for each part of a model, or one for matrices (Muon) and one for the rest, it is
the right one, and only that. The nearest relative is a vector (a norm's weight, a bias) if there is one, and the one
that has most of the qualified name in common.

The parameter is appended to a group that exists (an added group would break LR schedulers, which keep one base rate a
group), in the group without weight decay if there is one, and at the place that it has in ``model.parameters()``: so a
resumed run, whose optimizer is made after the conversion, finds its state in the same order.
"""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from mhc_compile.model.hyper_connection import hyper_connections

log = logging.getLogger("mhc_compile")


def common_parts(a: Sequence[str], b: Sequence[str]) -> int:
    """How many parts two qualified names have in common from the left."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def live_optimizers() -> list[Optimizer]:
    """Every optimizer of the process. ``type`` and not ``isinstance``: the latter wakes lazy proxies."""
    return [o for o in gc.get_objects() if issubclass(type(o), Optimizer)]


class _Relatives:
    """The parameters of a model that an optimizer may hold already, and how near they are to a new one."""

    def __init__(self, model: nn.Module, fresh: set[int]) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.rank = {identity: position for position, identity in enumerate(self.names)}
        self.old = {id(p) for p in model.parameters() if id(p) not in fresh}
        self.vectors = {id(p) for p in model.parameters() if id(p) in self.old and p.dim() < 2}
        self._parts = {identity: name.split(".") for identity, name in self.names.items()}

    def nearest(self, owner: str, held: Iterable[int]) -> tuple[tuple[bool, int], int | None]:
        """Of the parameters ``held`` the nearest to those of the module ``owner``: ((is a vector, parts of the name in
        common), identity); the first of equals, None if none is of this model."""
        known = sorted(self.old.intersection(held), key=self.rank.__getitem__)
        vectors = [identity for identity in known if identity in self.vectors]
        parts = owner.split(".")
        best: tuple[tuple[bool, int], int | None] = ((False, -1), None)
        for identity in vectors or known:
            common = common_parts(parts, self._parts[identity])
            if common > best[0][1]:
                best = (bool(vectors), common), identity
        return best


def adopt(model: nn.Module, parameters: Sequence[nn.Parameter], optimizers: Iterable[Optimizer] | None = None) -> int:
    """Append ``parameters`` of ``model`` to the optimizers that hold their nearest relatives; returns how many did.

    Called at conversion, before the first backward, so that gradient scalers and clipping see every gradient. A
    parameter that an optimizer of the process holds already is left alone.
    """
    willing = None if optimizers is None else list(optimizers)
    everything = {id(o): o for o in (*live_optimizers(), *(willing or ()))}
    relatives = _Relatives(model, {id(p) for p in parameters})
    held = {key: {id(p) for g in _groups(o) for p in g["params"]} for key, o in everything.items()}
    taken = set().union(*held.values())
    homeless: dict[str, list[nn.Parameter]] = {}
    for parameter in parameters:
        if id(parameter) in relatives.rank and id(parameter) not in taken:
            homeless.setdefault(relatives.names[id(parameter)].rpartition(".")[0], []).append(parameter)
    adopted: Counter[int] = Counter()
    for owner, siblings in homeless.items():
        _, nearest = relatives.nearest(owner, taken)
        for key, optimizer in everything.items():
            if nearest not in held[key] or (willing is not None and not any(optimizer is o for o in willing)):
                continue
            group = _group_for(_groups(optimizer), owner, relatives)
            for parameter in siblings:
                _insert(group, parameter, relatives)
            adopted[key] += len(siblings)
    for key, count in adopted.items():
        kind, rates = type(everything[key]).__name__, _rates(everything[key])
        log.info("%d hyper-connection parameters joined the %s (%s)", count, kind, rates)
    return len(adopted)


def _groups(optimizer: Optimizer) -> list[dict[str, Any]]:
    return getattr(optimizer, "param_groups", None) or []


def _rates(optimizer: Optimizer) -> str:
    return ", ".join(f"lr={g.get('lr')} weight_decay={g.get('weight_decay')}" for g in _groups(optimizer))


def _group_for(groups: list[dict[str, Any]], owner: str, relatives: _Relatives) -> dict[str, Any]:
    """The group without weight decay if there is one; among equals the one with the nearest relative."""

    def fitness(group: dict[str, Any]) -> tuple[bool, tuple[bool, int]]:
        return group.get("weight_decay", 0) == 0, relatives.nearest(owner, (id(p) for p in group["params"]))[0]

    return max((g for g in groups if any(id(p) in relatives.old for p in g["params"])), key=fitness)


def _insert(group: dict[str, Any], parameter: nn.Parameter, relatives: _Relatives) -> None:
    """Put a parameter where ``model.parameters()`` has it, relative to those that the group holds already."""
    own = relatives.rank[id(parameter)]
    held = group["params"]
    place = next((i for i, p in enumerate(held) if relatives.rank.get(id(p), -1) > own), len(held))
    if "param_names" in group:
        names = group["param_names"]
        name, prefix = relatives.names[id(parameter)], ""
        for known, other in zip(names, held, strict=True):
            inner = relatives.names.get(id(other))
            if inner is not None and known.endswith(inner):
                prefix = known.removesuffix(inner)  # the optimizer was given the names of a wrapper
                break
        names.insert(place, prefix + name)
    held.insert(place, parameter)


class StepHook:
    """Second line: an optimizer that the scan could not see, or that was made without the new parameters, adopts
    before its first step.

    Its first gradient of an adopted parameter is dropped: a gradient scaler has not unscaled it.
    """

    def __init__(self) -> None:
        self.models: list[tuple[weakref.ref[nn.Module], weakref.WeakKeyDictionary[Optimizer, int]]] = []

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Look at an optimizer once, and again when its groups have grown."""
        mine = {id(p) for group in _groups(optimizer) for p in group["params"]}
        size = len(mine)
        for reference, seen in self.models:
            model = reference()
            if model is None or seen.get(optimizer) == size:
                continue
            parameters = [p for _, hc in hyper_connections(model) for p in hc.parameters()]
            lacking = {id(p) for p in parameters} - mine
            related = any(id(p) in mine for p in model.parameters())
            if lacking and related and adopt(model, parameters, [optimizer]):
                for parameter in (p for g in _groups(optimizer) for p in g["params"]):
                    if id(parameter) in lacking:
                        parameter.grad = None
            seen[optimizer] = sum(len(group["params"]) for group in _groups(optimizer))


_step_hook: StepHook | None = None


def watch(model: nn.Module) -> None:
    """Register the second line for a converted model (a global, public hook of torch.optim, registered once)."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    global _step_hook
    if _step_hook is None:
        _step_hook = StepHook()
        register_optimizer_step_pre_hook(_step_hook)
    known = [(r, seen) for r, seen in _step_hook.models if r() is not None and r() is not model]
    _step_hook.models = [*known, (weakref.ref(model), weakref.WeakKeyDictionary())]


__all__ = ["adopt", "live_optimizers", "watch"]
