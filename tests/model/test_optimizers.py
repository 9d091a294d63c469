"""Optimizers made before the conversion train the new parameters, in the right group, in the right order, once."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

import mhc_compile
from mhc_compile.model import adopt, hyper_connections
from mhc_compile.model.optimizers import live_optimizers, watch
from tests.tiny import compiled, ids, loss_of, tiny, train


def ours(model: nn.Module) -> list[nn.Parameter]:
    return [p for _, hc in hyper_connections(model) for p in hc.parameters()]


def held(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def two_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": decay, "weight_decay": 0.1, **settings}, {"params": rest, "weight_decay": 0.0, **settings}]


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: AdamW(p, lr=1e-2),
    "adamw foreach": lambda p: AdamW(p, lr=1e-2, foreach=True),
    "adamw fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "sgd momentum": lambda p: SGD(p, lr=1e-1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1),
}


@pytest.mark.parametrize("name", MAKERS)
def test_made_before_the_first_call(name: str) -> None:
    """It steps like one that was made after prepare()."""
    late, early = tiny(layers=1), tiny(layers=1)
    mhc_compile.prepare(early, ids())
    before, after = MAKERS[name](late.parameters()), MAKERS[name](early.parameters())
    a, b = train(compiled(late), before, 3), train(compiled(early), after, 3)
    assert a == b
    assert held(before) == [id(p) for p in late.parameters()]
    for (key, p), q in zip(late.named_parameters(), early.parameters(), strict=True):
        assert torch.equal(p, q), key
    assert all(id(p) in held(before) for p in ours(late))
    assert all(hc.phi.any() for _, hc in hyper_connections(late))  # zero at the start


def test_state_dict_goes_over_to_an_optimizer_made_after_prepare() -> None:
    model = tiny()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    call = compiled(model)
    train(call, optimizer, 3)
    resumed = tiny(5)
    mhc_compile.load_state_dict(resumed, mhc_compile.state_dict(model))
    again = AdamW(resumed.parameters(), lr=1e-2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    torch._dynamo.reset()
    assert train(compiled(resumed), again, 3) == train(compiled(model), optimizer, 3)


def test_a_step_before_the_conversion_is_kept() -> None:
    """An optimizer that has state already goes on with it."""
    model = tiny()
    optimizer = AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 2)
    momentum = optimizer.state[model.head.weight]["exp_avg"].clone()
    train(compiled(model), optimizer, 1)
    assert optimizer.state[model.head.weight]["step"] == 3
    assert not torch.equal(momentum, optimizer.state[model.head.weight]["exp_avg"])
    assert all(optimizer.state[p]["step"] == 1 for p in ours(model))


def test_the_group_without_weight_decay() -> None:
    model = tiny()
    optimizer = AdamW(two_groups(model), lr=1e-2)
    train(compiled(model), optimizer)
    decay, rest = optimizer.param_groups
    assert not {id(p) for p in decay["params"]} & {id(p) for p in ours(model)}
    assert {id(p) for p in ours(model)} <= {id(p) for p in rest["params"]}
    order = {id(p): i for i, p in enumerate(model.parameters())}
    ranks = [order[id(p)] for p in rest["params"]]
    assert ranks == sorted(ranks)


def test_layer_wise_rates() -> None:
    """Each layer's hyper-connections join the undecayed group of that layer."""
    model = tiny()
    groups = []
    for part, rate in ((model.embed, 1e-4), (model.layers[0], 1e-3), (model.layers[1], 1e-2)):
        groups += two_groups(part, lr=rate)
    optimizer = AdamW([g for g in groups if g["params"]])
    compiled(model)(ids())
    for index, rate in ((0, 1e-3), (1, 1e-2)):
        for parameter in ours(model.layers[index]):
            (group,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
            assert (group["lr"], group["weight_decay"]) == (rate, 0.0)


def test_schedulers_and_clipping_go_on() -> None:
    model = tiny()
    optimizer = AdamW(two_groups(model), lr=1e-2)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
        torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 0.9**s, lambda s: 0.8**s]),
    ]
    call = compiled(model)
    for _ in range(3):
        train(call, optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for scheduler in schedulers:
            scheduler.step()
    assert len(optimizer.param_groups) == 2
    assert all(p.grad is not None for p in ours(model))


def test_names_of_parameters() -> None:
    model = tiny()
    optimizer = AdamW(model.named_parameters(), lr=1e-2)
    wrapped = AdamW(((f"module.{name}", p) for name, p in model.named_parameters()), lr=1e-2)
    train(compiled(model), optimizer)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    assert wrapped.param_groups[0]["param_names"] == [f"module.{name}" for name, _ in model.named_parameters()]
    optimizer.load_state_dict(optimizer.state_dict())


def test_an_unrelated_optimizer_is_left_alone() -> None:
    other = tiny(1)
    optimizer, empty = AdamW(other.parameters()), SGD([nn.Parameter(torch.zeros(3))], lr=0.1)
    before = held(optimizer), held(empty)
    model = tiny()
    train(compiled(model), AdamW(model.parameters()), 2)
    optimizer.step()
    empty.step()
    assert (held(optimizer), held(empty)) == before


def test_one_optimizer_for_each_half() -> None:
    """A parameter is adopted once: two optimizers would both step it."""
    model = tiny()
    first = SGD([*model.embed.parameters(), *model.layers[0].parameters()], lr=0.1)
    second = SGD([*model.layers[1].parameters(), *model.norm.parameters(), *model.head.parameters()], lr=0.1)
    compiled(model)(ids())
    assert {id(p) for p in ours(model.layers[0])} <= set(held(first))
    assert {id(p) for p in ours(model.layers[1])} <= set(held(second))
    assert sorted(held(first) + held(second)) == sorted(id(p) for p in model.parameters())
    loss_of(compiled(model)(ids())).backward()
    first.step()
    second.step()
    assert len(held(first) + held(second)) == len(list(model.parameters()))


def test_matrices_and_the_rest() -> None:
    """Muon takes matrices only: what is new goes to the optimizer that holds the vectors."""
    model = tiny()
    inner = [p for p in model.layers.parameters() if p.dim() == 2]
    muon = torch.optim.Muon(inner, lr=1e-2)
    rest = AdamW([p for p in model.parameters() if all(p is not q for q in inner)], lr=1e-2)
    call = compiled(model)
    for _ in range(2):
        loss_of(call(ids())).backward()
        muon.step()
        rest.step()
    assert {id(p) for p in ours(model)} <= set(held(rest))
    assert len(held(muon)) == len(inner)


def test_two_optimizers_over_all_parameters_both_adopt() -> None:
    """A notebook cell that was run twice leaves the old optimizer alive: the new one must not be passed over."""
    model = tiny()
    old, new = AdamW(model.parameters()), AdamW(model.parameters())
    compiled(model)(ids())
    assert held(old) == held(new) == [id(p) for p in model.parameters()]


def test_hyper_connections_in_an_optimizer_of_their_own() -> None:
    model = tiny()
    mhc_compile.prepare(model, ids())
    own = SGD(ours(model), lr=0.5)
    rest = SGD([p for name, p in model.named_parameters() if ".mhc" not in name], lr=0.1)
    call = compiled(model)
    loss_of(call(ids())).backward()
    own.step()
    rest.step()
    assert not set(held(own)) & set(held(rest))


def test_made_after_without_the_new_parameters() -> None:
    """From a list that was taken before the conversion: the second line adopts them before the first step."""
    model = tiny()
    old = list(model.parameters())
    call = compiled(model)
    call(ids())
    optimizer = AdamW(old, lr=1e-3)
    loss_of(call(ids())).backward()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert {id(p) for p in ours(model)} <= set(held(optimizer))
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters() if ".mhc" in name)
    loss_of(call(ids())).backward()
    optimizer.step()
    assert all(not torch.equal(hc.phi, start[f"{name}.phi"]) for name, hc in hyper_connections(model))


def test_group_added_later() -> None:
    model = tiny()
    optimizer = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    compiled(model)(ids())
    optimizer.step()
    optimizer.add_param_group({"params": [p for name, p in model.named_parameters() if ".mhc" not in name]})
    optimizer.step()
    assert {id(p) for p in ours(model)} <= set(held(optimizer))


def test_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    optimizer = AdamW(model.parameters())
    with caplog.at_level(logging.INFO, "mhc_compile"):
        train(compiled(model), optimizer, 3)
    said = [r.getMessage() for r in caplog.records if "joined" in r.getMessage()]
    assert len(said) == 1
    assert "20 hyper-connection parameters joined the AdamW" in said[0]


def test_ema() -> None:
    model = tiny()
    call = compiled(model)
    call(ids())
    optimizer = AdamW(model.parameters(), lr=1e-2)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    for _ in range(4):
        train(call, optimizer)
        average.update_parameters(model)
    with pytest.raises(mhc_compile.errors.UncompiledError):
        average(ids())
    assert torch.isfinite(compiled(average)(ids())).all()
    assert len(list(hyper_connections(average))) == 4
    # the average of bytes is nonsense; what is saved is not the average
    mhc_compile.load_state_dict(tiny(1), average.module.state_dict())


def test_adopt_says_how_many() -> None:
    model = tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    extra = nn.Parameter(torch.zeros(()))
    model.layers[0].register_parameter("extra", extra)
    assert adopt(model, [extra], [optimizer]) == 1
    assert adopt(model, [extra], [optimizer]) == 0
    assert [name for name, p in model.named_parameters() if p is extra] == ["layers.0.extra"]
    assert held(optimizer) == [id(p) for p in model.parameters()]


def test_live_optimizers_and_dead_models() -> None:
    model = tiny()
    optimizer = SGD(model.parameters(), lr=0.1)
    assert any(o is optimizer for o in live_optimizers())
    watch(model)
    watch(model)
    from mhc_compile.model import optimizers

    hook = optimizers._step_hook
    assert hook is not None
    assert sum(reference() is model for reference, _ in hook.models) == 1
    del model, optimizer
    gc.collect()
    watch(tiny(1))
    assert all(reference() is not None for reference, _ in hook.models[:-1])
