"""Checkpoints, both ways: converted into fresh models, plain into converted ones, and back to the plain model.

The parameters are registered on the model, so ``model.state_dict()`` has them, as plain tensors that safetensors
takes. What a fresh model lacks are the modules to load them into; they are made from the ``settings`` entries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import CheckpointError
from mhc_compile.model import guard, marker
from mhc_compile.model.hyper_connection import HyperConnection, hyper_connections, registration_order
from mhc_compile.model.optimizers import adopt, watch

_SETTINGS = ".settings"


def state_dict(model: nn.Module, *, plain: bool = False) -> dict[str, Tensor]:
    """All tensors of a model under its own names (no ``_orig_mod.`` prefix of a compiled wrapper).

    Args:
        model: the model or its compiled wrapper.
        plain: leave the hyper-connections out, for code that does not know them.
    """
    model = unwrap(model)
    ours = tuple(f"{name}." for name, _ in hyper_connections(model))
    return {k: v for k, v in model.state_dict().items() if not (plain and k.startswith(ours or ("\0",)))}


def load_state_dict(model: nn.Module, state: Mapping[str, Any], *, strict: bool = True, assign: bool = False) -> Any:
    """Load a checkpoint, converted or plain, into a model, converted or not.

    A converted checkpoint makes the missing hyper-connections first, so it loads strictly into a fresh model, which
    then needs no second conversion; optimizers that hold the model's parameters adopt the new ones. A plain checkpoint
    leaves the hyper-connections of a converted model as they are. Of tied parameters one name is enough.

    Returns:
        What ``nn.Module.load_state_dict`` returns.

    Raises:
        CheckpointError: the hyper-connections of checkpoint and model differ, the checkpoint's cannot be placed, or
            keys or shapes do not fit. The model is unchanged then.
    """
    model = unwrap(model)
    state = _own_names(model, state)
    present = dict(hyper_connections(model))
    names = {key.removesuffix(_SETTINGS) for key in state if _is_ours(key, state)}
    fresh = {name: _from_checkpoint(model, name, state) for name in sorted(names - present.keys(), key=_order)}
    if names and present.keys() - names:
        raise CheckpointError(
            f"the checkpoint has no hyper-connection {min(present.keys() - names)}, which the model holds",
            cure="load it into a model converted with the same options, or into a fresh one",
        )
    for name in sorted(names & present.keys()):
        problem = present[name].disagreement(HyperConnection.from_settings(state[name + _SETTINGS], "meta").describe())
        if problem:
            raise CheckpointError(
                f"{name} of the model was made with {problem} of the checkpoint",
                cure="load it into a fresh model, which is then converted as the checkpoint says",
            )
    own = model.state_dict(keep_vars=True)
    if not names:
        ours = tuple(f"{name}." for name in present)
        state |= {key: value for key, value in own.items() if ours and key.startswith(ours)}
    _fill_tied(model, state, assign=assign)
    _check_keys(model, state, own | dict(_tensors(fresh)), strict=strict)
    guarded = []
    for name, module in fresh.items():
        owner, _, leaf = name.rpartition(".")
        module.train(model.get_submodule(owner).training)
        model.get_submodule(owner).add_module(leaf, module)
        guarded.append(guard.install(model.get_submodule(owner)) if owner else guard.install_below(model))
    try:
        result = model.load_state_dict(state, strict=strict, assign=assign)
    except Exception:
        for name in fresh:
            owner, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(owner), leaf)
        for handle in guarded:
            if handle is not None:
                handle.remove()
        raise
    if names:
        marker.unmark(model)
        _mark_live(model)
    if fresh:
        adopt(model, [p for module in fresh.values() for p in module.parameters()])
        watch(model)
    return result


def to_plain(model: nn.Module) -> nn.Module:
    """Drop the hyper-connections of a model (in place) and return it, the plain model that it was before.

    The plain parameters keep their trained values; what the hyper-connections learned is gone. Code compiled before
    raises when it is called.
    """
    model = unwrap(model)
    for name, _ in list(hyper_connections(model)):
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    guard.remove(model)
    marker.unmark(model)
    return model


def wrappers(model: nn.Module) -> Iterator[nn.Module]:
    """``torch.compile``'s wrapper and DDP's around a module, outermost first, then the module itself."""
    while True:
        yield model
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        if not isinstance(inner, nn.Module):
            return
        model = inner


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper (and inside DDP's), the module itself otherwise."""
    return list(wrappers(model))[-1]


def _own_names(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint under the model's names: without the prefixes of wrappers that it was saved from."""
    own = dict(state)
    while prefix := next((p for p in ("_orig_mod.", "module.") if own and all(k.startswith(p) for k in own)), ""):
        if hasattr(model, prefix[:-1]):
            break
        own = {key.removeprefix(prefix): value for key, value in own.items()}
    return own


def _is_ours(key: str, state: Mapping[str, Any]) -> bool:
    if not key.endswith(_SETTINGS):
        return False
    value = state[key]
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and f"{key.removesuffix(_SETTINGS)}.phi" in state


def _order(name: str) -> tuple[str, tuple[int, str]]:
    owner, _, leaf = name.rpartition(".")
    return owner, registration_order(leaf)


def _from_checkpoint(model: nn.Module, name: str, state: Mapping[str, Any]) -> HyperConnection:
    owner, _, leaf = name.rpartition(".")
    try:
        holder = model.get_submodule(owner)
    except AttributeError as error:
        raise CheckpointError(
            f"the checkpoint has a hyper-connection for {owner}, which the model lacks",
            cure="build the model with the architecture that the checkpoint was saved from",
        ) from error
    if hasattr(holder, leaf):
        raise CheckpointError(f"{name} of the model is a {type(getattr(holder, leaf)).__name__}, not ours")
    return HyperConnection.from_settings(state[name + _SETTINGS], _device(model, owner))


def _device(model: nn.Module, owner: str) -> torch.device:
    parameter = next(model.get_submodule(owner).parameters(), None)
    parameter = parameter if parameter is not None else next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _tensors(modules: Mapping[str, HyperConnection]) -> Iterator[tuple[str, Tensor]]:
    for name, module in modules.items():
        for key, value in module.state_dict(keep_vars=True).items():
            yield f"{name}.{key}", value


def _fill_tied(model: nn.Module, state: dict[str, Any], *, assign: bool) -> None:
    """One value for every name of a tied parameter; with ``assign`` one object, so that the tie holds."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for tied in groups.values():
        given = next((name for name in tied if name in state), None)
        if len(tied) == 1 or given is None:
            continue
        value = state[given]
        if assign and isinstance(value, Tensor):
            value = nn.Parameter(value.detach(), requires_grad=value.is_floating_point())
        for name in tied:
            if assign or name not in state:
                state[name] = value


def _check_keys(model: nn.Module, state: Mapping[str, Any], own: Mapping[str, Any], *, strict: bool) -> None:
    """What ``nn.Module.load_state_dict`` would refuse after it has copied the rest; said before anything is copied.

    Modules that load in their own way (hooks, an overridden method) are left to themselves.
    """
    special = tuple(
        f"{name}." if name else ""
        for name, module in model.named_modules()
        if not isinstance(module, HyperConnection)
        and (
            module._load_state_dict_pre_hooks
            or type(module)._load_from_state_dict is not nn.Module._load_from_state_dict
            or type(module).load_state_dict is not nn.Module.load_state_dict
        )
    )

    def plain(keys: Any) -> list[str]:
        return sorted(k for k in keys if not (special and k.startswith(special)) and not k.endswith("_extra_state"))

    problems = []
    if strict:
        problems += [f"{key} is missing" for key in plain(own.keys() - state.keys())]
        problems += [f"{key} is unknown to the model" for key in plain(state.keys() - own.keys())]
    for key in plain(own.keys() & state.keys()):
        have, want = _shape(state[key]), _shape(own[key])
        if not key.endswith(_SETTINGS) and None not in (have, want) and have != want and (want, have) != ((), (1,)):
            problems.append(f"{key} is {list(have or ())} in the checkpoint, {list(want or ())} in the model")
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the model: {'; '.join(problems[:5])}{more}",
            cure="build the model with the architecture that the checkpoint was saved from (strict=False ignores "
            "missing and unknown keys)",
        )


def _shape(value: Any) -> tuple[int, ...] | None:
    if not isinstance(value, Tensor) or isinstance(value, nn.UninitializedParameter):
        return None
    return tuple(value.shape)


def _mark_live(model: nn.Module) -> None:
    first = next(hyper_connections(model), None)
    if first is not None:
        marker.mark(model, first[1].spec.streams, first[1].variant)
