"""The backend as torch.compile sees it: one graph, one compilation, every mode, clear errors."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile.backend as backend
from mhc_compile.errors import FragmentError, MhcError, MismatchError, NoSiteError, NotConvertedWarning, OptionError
from mhc_compile.model import hyper_connections
from tests.tiny import EAGER, Block, Flat, compiled, ids, loss_of, tiny, train

VARIANTS = ["mhc", "single_pass", "identity", "hc"]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each time the backend was asked."""
    seen: list[Any] = []
    real = backend.convert

    def counted(*args: Any) -> Any:
        seen.append(args)
        return real(*args)

    monkeypatch.setattr(backend, "convert", counted)
    return seen


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_step_zero_is_the_plain_model(variant: str, compiler: str) -> None:
    plain = tiny()
    model = copy.deepcopy(plain)
    want, got = plain(ids()), compiled(model, variant=variant, compiler=compiler)(ids())
    assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    loss_of(want).backward()
    loss_of(got).backward()
    for name, parameter in plain.named_parameters():
        assert torch.allclose(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-7), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_move_everything(variant: str) -> None:
    """The symmetry is broken: streams part, and every new tensor learns."""
    model = tiny(layers=2)
    call = compiled(model, variant=variant, collapse="mean")
    call(ids())
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = train(call, torch.optim.AdamW(model.parameters(), lr=1e-2), 20)
    assert losses[-1] < losses[0]
    unmoved = [name for name, p in model.named_parameters() if torch.equal(p, start[name])]
    if variant == "single_pass":  # no site of this chain reads what the last one mixes, or the first one gates
        unmoved = [name for name in unmoved if ".mhc" not in name]
    assert unmoved == []
    post = [hc.coefficients(torch.randn(3, 4, 16))[1] for _, hc in hyper_connections(model)]
    assert max(float(p.detach().std(-1).max()) for p in post) > 1e-3


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_once(conversions: list[Any], compiler: str) -> None:
    model = tiny(layers=1)
    call = torch.compile(model, backend="mhc", fullgraph=True, options={"compiler": compiler})
    train(call, torch.optim.AdamW(model.parameters()), 3)
    assert len(conversions) == 1


def test_one_recompilation_for_each_dynamic_dimension(conversions: list[Any]) -> None:
    call = compiled(tiny(layers=1))
    for batch, length in ((2, 5), (3, 5), (4, 5), (6, 5), (5, 6), (7, 8), (2, 9)):
        assert call(ids(batch, length)).shape == (batch, length, 19)
    assert len(conversions) <= 3


def test_dynamic_from_the_start(conversions: list[Any]) -> None:
    model = tiny(layers=1)
    call = torch.compile(model, backend="mhc", dynamic=True, options=EAGER)
    for batch, length in ((2, 5), (3, 6), (4, 7)):
        loss_of(call(ids(batch, length))).backward()
    assert len({len(list(hyper_connections(model)))}) == 1
    assert all(isinstance(size, int) for p in model.parameters() for size in p.shape)
    assert len(conversions) <= 2


def test_modes_of_running() -> None:
    model = tiny(layers=1)
    call = compiled(model)
    x = ids()
    want = call(x)
    names = [name for name, _ in model.named_parameters()]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.allclose(call(x), want)
    model.eval()
    assert torch.allclose(call(x), want)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = call(x)
        loss_of(mixed).backward()
    assert mixed.dtype == torch.bfloat16
    assert torch.allclose(mixed.float(), want, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant: str) -> None:
    model = tiny(layers=1).bfloat16()
    output = compiled(model, variant=variant)(ids())
    assert output.dtype == torch.bfloat16
    loss_of(output).backward()
    for _, hc in hyper_connections(model):
        for parameter in hc.parameters():
            assert parameter.grad is None or (parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all())


def test_ways_to_hand_over_a_model() -> None:
    x = torch.randn(2, 3, 16)
    model = Flat(2)
    want = model(x)

    method = copy.deepcopy(model)
    method.compile(backend="mhc", options=EAGER)
    closed = copy.deepcopy(model)
    listed = [copy.deepcopy(model), copy.deepcopy(model)]
    named = {"a": copy.deepcopy(model)}
    in_dict = torch.compile(lambda models, y: models["a"](y), backend="mhc", options=EAGER)
    in_list = torch.compile(lambda models, y: [m(y) for m in models][1], backend="mhc", options=EAGER)
    calls = {
        "module.compile": (method, lambda: method(x)),
        "closure": (closed, lambda: torch.compile(lambda y: closed(y), backend="mhc", options=EAGER)(x)),
        "argument": (named["a"], lambda: in_dict(named, x)),
        "list": (listed[1], lambda: in_list(listed, x)),
    }  # fmt: skip
    for name, (target, call) in calls.items():
        torch._dynamo.reset()
        assert torch.allclose(call(), want, rtol=1e-5, atol=1e-6), name
        assert len(list(hyper_connections(target))) == 2, name
        with torch.no_grad():
            next(hyper_connections(target))[1].bias.add_(torch.randn(24))
        assert not torch.allclose(call(), want, rtol=1e-3), name


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"stream": 4}, "streams"),
        ({"variant": "mch"}, "mhc"),
        ({"streams": 5}, "1, 2, 3, 4, 8"),
        ({"verify": "maybe"}, "verify"),
    ],
)
def test_option_errors_come_at_the_first_call(options: dict[str, Any], hint: str) -> None:
    call = compiled(tiny(layers=1), **options)
    for _ in range(2):
        with pytest.raises(OptionError, match=hint):
            call(ids())


def test_no_model_is_no_error() -> None:
    """Helper functions are compiled as they are."""
    assert torch.compile(lambda a, b: a + b.sin(), backend="mhc", options=EAGER)(
        torch.ones(2), torch.ones(2)
    ).shape == (2,)


@pytest.mark.slow
def test_an_optimizer_step_is_compiled_as_it_is() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    parameter.grad = torch.ones(2)
    torch.compile(optimizer.step, backend="mhc", options=EAGER)()
    assert torch.allclose(parameter, torch.full((2,), 0.9))


def test_one_stream_is_the_plain_model() -> None:
    model = tiny(layers=1)
    want = model(ids())
    assert torch.equal(compiled(model, streams=1)(ids()), want)
    assert not any(hyper_connections(model))
    assert torch.equal(model(ids()), want)


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        torch._dynamo.graph_break()
        return self.b(x)


def test_a_cut_chain_names_the_line() -> None:
    model = Cut()
    with pytest.raises(FragmentError) as info:
        compiled(model)(torch.randn(2, 3, 16))
    assert "tiny.py" in str(info.value.where)
    assert not any(hyper_connections(model))


def test_warn_compiles_the_plain_model_and_says_so_once() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    x = torch.randn(2, 16)
    call = compiled(model, on_failure="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.allclose(call(x), model(x))
        assert torch.allclose(call(x), model(x))
    ours = [w for w in caught if issubclass(w.category, NotConvertedWarning)]
    assert len(ours) == 1
    with pytest.raises(NoSiteError):
        compiled(model)(x)


def test_warn_does_not_unconvert() -> None:
    """A model that holds hyper-connections runs with them or not at all."""
    model = tiny(layers=1)
    compiled(model)(ids())
    with pytest.raises(MismatchError):
        compiled(model, streams=2, on_failure="warn")(ids())


@pytest.mark.parametrize("where", ["pass", "compiler"])
def test_internal_errors(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any exception of ours is reported as such, never a graph break; nothing is registered."""
    import mhc_compile.convert

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise KeyError("inside")

    if where == "pass":
        monkeypatch.setattr(mhc_compile.convert, "ORDER", [fail])
    else:
        monkeypatch.setattr(backend, "_compile", fail)
    model = tiny(layers=1)
    keys = list(model.state_dict())
    with torch._dynamo.config.patch(suppress_errors=True), pytest.raises(MhcError, match="internal error") as info:
        compiled(model)(ids())
    assert isinstance(info.value.__cause__, KeyError)
    assert list(model.state_dict()) == keys
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_presets_and_modes() -> None:
    model = tiny(layers=1)
    torch.compile(model, backend="mhc", mode="single_pass")  # looked up at the first call
    compiled(model, preset="single_pass")(ids())
    assert {hc.variant for _, hc in hyper_connections(model)} == {"single_pass"}
    assert backend.reports[-1].set_by["variant"] == "preset:single_pass"


@pytest.mark.slow
def test_inductor_trains() -> None:
    model = nn.Sequential(Block(), nn.LayerNorm(16))
    plain = copy.deepcopy(model)
    x = torch.randn(2, 3, 16)
    call = torch.compile(model, backend="mhc", fullgraph=True)
    got = call(x)
    assert torch.allclose(got, plain(x), rtol=1e-4, atol=1e-5)
    loss_of(got).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
