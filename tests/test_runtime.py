"""What compiled code calls: live parameters, or an error."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhc_compile.errors import CheckpointError, FragmentError, MismatchError, UncompiledError
from mhc_compile.runtime import Converted, Failed, dropped


def pair() -> tuple[nn.Module, nn.Linear, Converted]:
    owner, module = nn.Module(), nn.Linear(2, 2)
    owner.add_module("mhc0", module)
    return (
        owner,
        module,
        Converted(lambda *args: args, [(module, "weight"), (module, "bias")], [(owner, "mhc0", module)]),
    )


def test_parameters_are_looked_up_at_each_call() -> None:
    _, module, call = pair()
    assert call(1) == (1, module.weight, module.bias)
    module.weight = nn.Parameter(torch.zeros(2, 2))
    assert call()[0] is module.weight


def test_gone_or_replaced() -> None:
    owner, module, call = pair()
    owner.mhc0 = nn.Linear(2, 2)
    with pytest.raises(UncompiledError, match="mhc0"):
        call()
    owner.mhc0 = module
    call()
    del owner.mhc0
    with pytest.raises(UncompiledError, match="to_plain"):
        call()


def test_frozen_parameters() -> None:
    owner, module, _ = pair()
    module.bias.requires_grad_(False)
    call = Converted(lambda *args: args, [(module, "weight"), (module, "bias")], [(owner, "mhc0", module)])
    call()
    module.weight.requires_grad_(False)
    call()
    module.bias.requires_grad_(True)
    with torch.no_grad():
        call()
    with pytest.raises(MismatchError, match="bias"):
        call()


def test_failed_raises_a_fresh_copy_each_time() -> None:
    cause = ValueError("why")
    error = FragmentError("cut", where="model.py:3", cure="join it")
    error.__cause__ = cause
    error.report = report = object()
    failed = Failed(error)
    caught = []
    for _ in range(2):
        with pytest.raises(FragmentError) as info:
            failed(1, 2)
        caught.append(info.value)
    assert caught[0] is not caught[1]
    assert caught[0] is not error
    assert caught[0].__cause__ is cause
    assert (caught[0].what, caught[0].where, caught[0].report) == ("cut", "model.py:3", report)
    assert caught[0].cure == "join it; then call torch._dynamo.reset() before the next try"
    assert error.__traceback__ is None


def test_failed_without_a_cure() -> None:
    with pytest.raises(CheckpointError) as info:
        Failed(CheckpointError("no"))()
    assert info.value.cure == "call torch._dynamo.reset() before the next try"


def test_dropped() -> None:
    assert "reset" in str(dropped("mhc0"))
