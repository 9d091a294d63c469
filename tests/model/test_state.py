"""Checkpoints of converted models: there and back, bit for bit, or refused with nothing changed."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import CheckpointError, MismatchError, UncompiledError
from mhc_compile.model import HyperConnection, hyper_connections
from tests.tiny import Flat, Tiny, compiled, ids, loss_of, tiny, train


def trained(seed: int = 0, steps: int = 2, **options: Any) -> tuple[Tiny, Any]:
    """A converted model whose hyper-connections have left their start, and its compiled wrapper."""
    model = tiny(seed, layers=1)
    call = compiled(model, **options)
    train(call, torch.optim.AdamW(model.parameters(), lr=3e-2), steps)
    return model, call


def picture(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[key], value) for key, value in before.items())


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity", "hc"])
@pytest.mark.parametrize("route", ["safetensors", "torch"])
def test_into_a_fresh_model(variant: str, route: str, tmp_path: Path) -> None:
    model, call = trained(variant=variant)
    want = call(ids())
    if route == "safetensors":
        save_file({k: v.contiguous() for k, v in mhc_compile.state_dict(model).items()}, tmp_path / "m.safetensors")
        state = load_file(tmp_path / "m.safetensors")
    else:
        torch.save(call.state_dict(), tmp_path / "m.pt")  # the wrapper's, with its prefix
        state = torch.load(tmp_path / "m.pt", weights_only=True)
    fresh = tiny(9, layers=1)
    result = mhc_compile.load_state_dict(fresh, state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert list(dict(fresh.named_parameters())) == list(dict(model.named_parameters()))
    with pytest.raises(UncompiledError):
        fresh(ids())
    assert torch.equal(compiled(fresh, variant=variant)(ids()), want)


def test_learned_collapse_travels() -> None:
    model, call = trained(collapse="learned")
    fresh = tiny(9, layers=1)
    mhc_compile.load_state_dict(fresh, mhc_compile.state_dict(model))
    assert torch.equal(compiled(fresh, collapse="learned")(ids()), call(ids()))


def test_order_of_parameters_is_that_of_a_conversion() -> None:
    """More than ten hyper-connections on one module: an optimizer state goes by position."""

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(11):
                x = x + self.proj(self.norm(x))
            return torch.tanh(x)

    model, fresh = Reused(), Reused()
    x = torch.randn(2, 3, 8)
    mhc_compile.prepare(model, x, collapse="learned")
    state = dict(sorted(mhc_compile.state_dict(model).items()))
    mhc_compile.load_state_dict(fresh, state)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in fresh.named_parameters()] == names
    assert len(list(hyper_connections(fresh))) == 12
    with pytest.raises(UncompiledError):
        fresh(x)


def test_optimizer_made_before_the_load_adopts() -> None:
    model, _ = trained()
    fresh = tiny(9, layers=1)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=0.1)
    mhc_compile.load_state_dict(fresh, mhc_compile.state_dict(model))
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in fresh.parameters()]


def test_plain_checkpoint_into_a_converted_model() -> None:
    model, call = trained()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".mhc" in name}
    other = tiny(5, layers=1)
    mhc_compile.load_state_dict(model, other.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert torch.equal(model.head.weight, other.head.weight)
    with mhc_compile.plain():
        assert torch.equal(model(ids()), other(ids()))
    assert not torch.equal(call(ids()), other(ids()))


def test_to_plain_is_the_plain_model_bit_for_bit() -> None:
    model = tiny()
    x = ids()
    want, keys = model(x), list(model.state_dict())
    call = compiled(model)
    call(x)
    assert mhc_compile.to_plain(call) is model
    assert torch.equal(model(x), want)
    assert list(model.state_dict()) == keys
    assert hooks(model) == 0
    with pytest.raises(UncompiledError, match="reset"):
        call(x)
    torch._dynamo.reset()
    assert torch.allclose(compiled(model)(x), want, rtol=1e-5, atol=1e-6)


def test_state_dict_without_ours() -> None:
    model, call = trained()
    plain = tiny(9, layers=1)
    plain.load_state_dict(mhc_compile.state_dict(call, plain=True))
    with mhc_compile.plain():
        assert torch.equal(plain(ids()), model(ids()))
    assert not any(key.startswith("_orig_mod.") for key in mhc_compile.state_dict(call))


BROKEN = {
    "a shape": lambda s: s.__setitem__("head.weight", torch.zeros(3, 3)),
    "a missing key": lambda s: s.pop("head.weight"),
    "an unknown key": lambda s: s.__setitem__("nonsense", torch.zeros(1)),
    "a missing parameter of ours": lambda s: s.pop("layers.0.mhc0.bias"),
    "the shape of one of ours": lambda s: s.__setitem__("layers.0.mhc0.phi", torch.zeros(2, 2)),
    "settings of another size": lambda s: s.__setitem__("layers.0.mhc0.settings", torch.zeros(9, dtype=torch.uint8)),
    "one hyper-connection too few": lambda s: [s.pop(k) for k in list(s) if ".mhc1." in k],
    "one for a module that is not there": lambda s: s.update(
        {k.replace("layers.0", "layers.7"): v for k, v in list(s.items()) if ".mhc0." in k}
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_failing_load_changes_nothing(what: str) -> None:
    state = mhc_compile.state_dict(_prepared(3))
    BROKEN[what](state)
    for model in (tiny(layers=1), _prepared(0)):
        if what == "one hyper-connection too few" and not any(hyper_connections(model)):
            continue  # for a fresh model that is a checkpoint of a model with fewer sites
        before, guards = picture(model), hooks(model)
        with pytest.raises(CheckpointError):
            mhc_compile.load_state_dict(model, state)
        assert unchanged(model, before)
        assert hooks(model) == guards


def _prepared(seed: int, **options: Any) -> Tiny:
    model = tiny(seed, layers=1)
    mhc_compile.prepare(model, ids(), **options)
    return model


@pytest.mark.parametrize(
    "options", [{"streams": 2}, {"variant": "single_pass"}, {"sinkhorn_iters": 3}, {"variant": "hc"}], ids=str
)
def test_other_settings(options: dict[str, Any]) -> None:
    """Refused by our loader, by torch's own, and by the compiler."""
    state = mhc_compile.state_dict(_prepared(3, **options))
    model = _prepared(0)
    before = picture(model)
    with pytest.raises(CheckpointError, match=next(iter(options)).partition("_")[0]):
        mhc_compile.load_state_dict(model, state)
    assert unchanged(model, before)
    with pytest.raises(RuntimeError, match="mhc0"):
        model.load_state_dict(state)
    fresh = tiny(layers=1)
    mhc_compile.load_state_dict(fresh, state)
    with pytest.raises(MismatchError):
        compiled(fresh)(ids())
    torch._dynamo.reset()
    assert compiled(fresh, **options)(ids()).shape == (2, 5, 19)


@pytest.mark.parametrize("ours", [True, False])
def test_another_start_is_no_mismatch(ours: bool) -> None:
    """``init`` says how parameters began; a checkpoint knows better what they are."""
    state = mhc_compile.state_dict(_prepared(3, init="paper"))
    model = _prepared(0)
    if ours:
        mhc_compile.load_state_dict(model, state)
    else:
        model.load_state_dict(state)
    assert unchanged(model, state)
    assert {hc.init for _, hc in hyper_connections(model)} == {"paper"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(19, 16), nn.Linear(16, 19, bias=False)
        self.head.weight = self.embed.weight
        self.block = Flat(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x)))


@pytest.mark.parametrize("assign", [False, True])
def test_weight_tying(assign: bool) -> None:
    torch.manual_seed(0)
    model, fresh = Tied(), Tied()
    call = compiled(model)
    train(call, torch.optim.SGD(model.parameters(), lr=0.1))
    assert model.head.weight is model.embed.weight
    state = {k: v for k, v in mhc_compile.state_dict(model).items() if k != "head.weight"}  # as safetensors keeps it
    mhc_compile.load_state_dict(fresh, state, assign=assign)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(compiled(fresh)(ids()), call(ids()))


def test_load_while_compiled() -> None:
    """New values, and with assign=True new objects, are what the artefact runs with; nothing is compiled again."""
    model, call = trained()
    other, other_call = trained(4)
    want = other_call(ids())
    call(ids())
    with torch._dynamo.config.patch(error_on_recompile=True):
        mhc_compile.load_state_dict(call, mhc_compile.state_dict(other))
        assert torch.equal(call(ids()), want)
    mhc_compile.load_state_dict(model, {k: v.clone() for k, v in other.state_dict().items()}, assign=True)
    assert torch.equal(call(ids()), want)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: _through_a_file(m),
}


def _through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    model, call = trained()
    twin = COPIES[how](model)
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert len(list(hyper_connections(twin))) == 2
    with pytest.raises(UncompiledError):
        twin(ids())
    twin_call = compiled(twin)
    assert torch.equal(twin_call(ids()), call(ids()))
    before = picture(model)
    train(twin_call, torch.optim.AdamW(twin.parameters(), lr=1e-2))
    assert unchanged(model, before)
    assert not torch.equal(twin.layers[0].mhc0.phi, model.layers[0].mhc0.phi)
    assert torch.equal(call(ids()), call(ids()))


def test_shallow_copy_shares() -> None:
    model, call = trained()
    twin = copy.copy(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert torch.equal(compiled(twin)(ids()), call(ids()))


def test_deepcopy_of_the_wrapper() -> None:
    model, call = trained()
    twin = copy.deepcopy(call)
    assert torch.equal(twin(ids()), call(ids()))
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})


def test_hyper_connections_moved_to_another_object_are_missed() -> None:
    """A module put in the place of another one: the artefact would go on with what it was compiled for."""
    model, call = trained()
    call(ids())
    model.layers[0].mhc0 = copy.deepcopy(model.layers[0].mhc0)
    with pytest.raises(UncompiledError, match="replaced"):
        call(ids())


def test_own_attribute_of_that_name() -> None:
    model = tiny(layers=1)
    model.layers[0].mhc0 = nn.Identity()
    with pytest.raises(MismatchError, match="Identity"):
        compiled(model)(ids())
    with pytest.raises(CheckpointError, match="Identity"):
        mhc_compile.load_state_dict(model, mhc_compile.state_dict(_prepared(0)))
    assert not any(isinstance(m, HyperConnection) for m in model.modules())


def test_frozen_while_compiling() -> None:
    model = _prepared(0)
    for _, hc in hyper_connections(model):
        hc.requires_grad_(False)
    call = compiled(model, compiler="aot_eager")
    loss_of(call(ids())).backward()
    assert all(hc.phi.grad is None for _, hc in hyper_connections(model))
    assert model.head.weight.grad is not None
    for _, hc in hyper_connections(model):
        hc.requires_grad_(True)
    with pytest.raises(MismatchError, match="frozen"):
        call(ids())
    with torch.no_grad():
        call(ids())
    torch._dynamo.reset()
    loss_of(compiled(model, compiler="aot_eager")(ids())).backward()
    assert all(hc.phi.grad is not None for _, hc in hyper_connections(model))


def test_frozen_after_compiling() -> None:
    model, call = trained()
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model.zero_grad()
    loss_of(call(ids())).backward()
    assert all(p.grad is None for name, p in model.named_parameters() if not name.startswith("head"))
