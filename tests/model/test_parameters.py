"""Where the parameters of a site go: on the module that owns the add, under stable names, of each instance its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import MismatchError
from mhc_compile.model import hyper_connections
from tests.tiny import EAGER, Block, Flat, Tiny, compiled, ids, loss_of, tiny, train


class Residual(nn.Sequential):
    """The common spelling: a Sequential that adds its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def residual_sequential() -> nn.Module:
    return nn.Sequential(
        *[Residual(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(2)], nn.LayerNorm(16)
    )


class Pairs(nn.Module):
    """A list of lists, unpacked in the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)]) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for mix, up in self.layers:
            x = mix(x).tanh() + x
            x = up(x).tanh() + x
        return self.norm(x)


class Children(nn.ModuleList):
    """The model itself is the list."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = x + layer(x).tanh()
        return torch.tanh(x)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.steps.values():
            x = x + layer(x).tanh()
        return self.norm(x)


CONTAINERS: dict[str, Callable[[], nn.Module]] = {
    "Sequential that adds": residual_sequential,
    "list of lists": Pairs,
    "the root is a list": lambda: Children([nn.Linear(16, 16), nn.Linear(16, 16)]),
    "dict": Named,
    "list": Flat,
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_containers_get_no_further_child(name: str) -> None:
    """Whoever loops over a container must find what was in it: when it is traced again, and as a plain model."""
    model = CONTAINERS[name]()
    x = torch.randn(2, 3, 16)
    want = model(x)
    children = {key: list(m._modules) for key, m in model.named_modules() if isinstance(m, _KINDS)}
    call = compiled(model)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.allclose(call(x), want, rtol=1e-5, atol=1e-6)
    call(torch.randn(3, 4, 16))
    assert {key: list(m._modules) for key, m in model.named_modules() if isinstance(m, _KINDS)} == children
    assert any(hyper_connections(model))
    with pytest.raises(mhc_compile.errors.UncompiledError):
        model(x)
    with mhc_compile.plain():
        assert torch.equal(model(x), want)


_KINDS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def test_names() -> None:
    model = tiny()
    mhc_compile.prepare(model, ids(), collapse="learned")
    names = [name for name, _ in hyper_connections(model)]
    assert names == ["layers.0.mhc0", "layers.0.mhc1", "layers.1.mhc0", "layers.1.mhc1", "layers.1.mhc_head"]
    own = [name for name, _ in model.layers[0].mhc0.named_parameters()]
    assert own == ["phi", "bias", "alpha_pre", "alpha_post", "alpha_res"]
    assert [hc.position for _, hc in hyper_connections(model)] == [0, 1, 2, 3, 0]


def test_each_instance_has_its_own() -> None:
    models = [tiny(seed, layers=1) for seed in range(3)]
    options = {**EAGER}
    for model in models:
        torch.compile(model, backend="mhc", options=options)(ids())
    owned = [{id(p) for _, hc in hyper_connections(m) for p in hc.parameters()} for m in models]
    assert all(len(own) == 10 for own in owned)
    assert not owned[0] & owned[1]
    assert not owned[1] & owned[2]


def test_shared_layer_has_one_set_for_each_use() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.norm = Block(), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.block(self.block(x)))

    model = Twice()
    mhc_compile.prepare(model, torch.randn(2, 3, 16))
    assert [name for name, _ in hyper_connections(model)] == [f"block.mhc{i}" for i in range(4)]


def test_registered_parameters_are_those_that_run() -> None:
    model = tiny(layers=1)
    call = compiled(model)
    x = ids()
    before = call(x)
    with torch.no_grad():
        model.layers[0].mhc0.bias.add_(torch.randn(24))
    assert not torch.equal(call(x), before)
    loss_of(call(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_made_without_gradients_and_trained_later(mode: Callable[[], Any]) -> None:
    model = tiny(layers=1)
    call = compiled(model)
    with mode():
        call(ids())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    train(call, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(p.grad is not None for p in model.parameters())


def test_train_and_eval_follow_the_owner() -> None:
    model = tiny(layers=1).eval()
    mhc_compile.prepare(model, ids())
    assert not any(m.training for m in model.modules())
    assert all(m.training for m in model.train().modules())


TWICE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"streams": 2}),
    ({}, {"streams": 1}),
    ({}, {"rewrite": False}),
    ({}, {"variant": "single_pass"}),
    ({"variant": "identity"}, {"variant": "hc"}),
    ({}, {"sinkhorn_iters": 3}),
    ({}, {"collapse": "learned"}),
    ({"collapse": "learned"}, {}),
    ({}, {"exclude": ["layers.1"]}),
]


@pytest.mark.parametrize(("first", "second"), TWICE, ids=str)
@pytest.mark.parametrize("on_failure", ["raise", "warn"])
def test_other_options_on_a_converted_model(first: dict[str, Any], second: dict[str, Any], on_failure: str) -> None:
    """They would run what was trained as something else, or not at all; a warning is not enough."""
    model = tiny()
    mhc_compile.prepare(model, ids(), **first)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MismatchError):
        compiled(model, on_failure=on_failure, **second)(ids())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch._dynamo.reset()
    compiled(model, on_failure=on_failure, **first)(ids())


def test_what_does_not_change_the_numbers_may_change() -> None:
    model = tiny(layers=1)
    want = compiled(model)(ids())
    for options in ({"init": "paper"}, {"fuse": False}, {"raise_patterns": False}, {"verify": True}):
        torch._dynamo.reset()
        assert torch.equal(compiled(model, **options)(ids()), want)


def test_a_mismatch_is_of_that_instance() -> None:
    """The next model of the class, under the same options, is converted."""
    first, second = tiny(0, layers=1), tiny(1, layers=1)
    mhc_compile.prepare(first, ids())
    options = {**EAGER, "streams": 2}
    with pytest.raises(MismatchError):
        torch.compile(first, backend="mhc", options=options)(ids())
    torch.compile(second, backend="mhc", options=options)(ids())
    assert {hc.spec.streams for _, hc in hyper_connections(second)} == {2}


def test_two_chains_on_one_call() -> None:
    """More parameters of a model may come with a part that was not used before."""

    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = Tiny(1), Flat(2)

        def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
            y = self.text(x)
            return y if image is None else y + self.image(image).mean()

    model = Towers()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    call = compiled(model)
    call(ids())
    assert {name.split(".")[0] for name, _ in hyper_connections(model)} == {"text"}
    loss_of(call(ids(), torch.randn(2, 3, 16))).backward()
    assert {name.split(".")[0] for name, _ in hyper_connections(model)} == {"text", "image"}
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    loss_of(call(ids())).backward()
