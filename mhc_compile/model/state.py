"""Checkpoints, both ways: converted into fresh models, plain into converted ones, and back to the plain model.

The parameters are registered on the model, so ``model.state_dict()`` has them, as plain tensors that safetensors
takes. What a fresh model lacks are the modules to load them into; they are made from the ``settings`` entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mhc_compile.errors import CheckpointError
from mhc_compile.model import guard, marker
from mhc_compile.model.hyper_connection import HyperConnection, hyper_connections

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
    then needs no second conversion. A plain checkpoint leaves the hyper-connections of a converted model as they are.

    Returns:
        What ``nn.Module.load_state_dict`` returns.

    Raises:
        CheckpointError: the hyper-connections of checkpoint and model differ, or the checkpoint's cannot be placed.
            The model is unchanged then.
    """
    model = unwrap(model)
    state = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    names = {key.removesuffix(_SETTINGS) for key in state if _is_ours(key, state)}
    present = dict(hyper_connections(model))
    fresh: dict[str, HyperConnection] = {}
    for name in sorted(names - present.keys()):
        owner, _, _ = name.rpartition(".")
        try:
            model.get_submodule(owner)
        except AttributeError as error:
            raise CheckpointError(
                f"the checkpoint has a hyper-connection for {owner}, which the model lacks",
                cure="build the model with the architecture that the checkpoint was saved from",
            ) from error
        fresh[name] = HyperConnection.from_settings(state[name + _SETTINGS], _device(model, owner))
    if names and present.keys() - names:
        raise CheckpointError(
            f"the checkpoint has no hyper-connection {min(present.keys() - names)}, which the model holds",
            cure="load it into a model converted with the same options, or into a fresh one",
        )
    for name in sorted(names & present.keys()):
        saved = HyperConnection.from_settings(state[name + _SETTINGS], "meta").describe()
        if saved != present[name].describe():
            raise CheckpointError(f"{name} differs: the checkpoint has {saved}, the model {present[name].describe()}")
    for name, module in fresh.items():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).add_module(leaf, module)
        if owner:
            guard.install(model.get_submodule(owner))
    if not names:
        state.update(
            {k: v for k, v in model.state_dict().items() if k.startswith(tuple(f"{n}." for n in present))}
            if present
            else {}
        )
    try:
        result = model.load_state_dict(state, strict=strict, assign=assign)
    except Exception:
        for name in fresh:
            owner, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(owner), leaf)
        if fresh and not present:
            guard.remove(model)
        raise
    if names:
        marker.unmark(model)
        _mark_live(model)
    return result


def to_plain(model: nn.Module) -> nn.Module:
    """Drop the hyper-connections of a model (in place) and return it, the plain model that it was before.

    The plain parameters keep their trained values; what the hyper-connections learned is gone.
    """
    model = unwrap(model)
    for name, _ in list(hyper_connections(model)):
        owner, _, leaf = name.rpartition(".")
        delattr(model.get_submodule(owner), leaf)
    guard.remove(model)
    marker.unmark(model)
    return model


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``'s wrapper (and inside DDP's), the module itself otherwise."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ == "DistributedDataParallel":
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _is_ours(key: str, state: Mapping[str, Any]) -> bool:
    if not key.endswith(_SETTINGS):
        return False
    value = state[key]
    return isinstance(value, Tensor) and value.dtype == torch.uint8 and f"{key.removesuffix(_SETTINGS)}.phi" in state


def _device(model: nn.Module, owner: str) -> torch.device:
    parameter = next(model.get_submodule(owner).parameters(), None)
    parameter = parameter if parameter is not None else next(model.parameters(), None)
    return parameter.device if parameter is not None else torch.device("cpu")


def _mark_live(model: nn.Module) -> None:
    first = next(hyper_connections(model), None)
    if first is not None:
        config = getattr(model, "config", None)
        if config is not None and hasattr(config, "to_json_string"):
            config.mhc = marker.LiveMarker(streams=first[1].spec.streams)
