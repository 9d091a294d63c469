"""``standalone``: equal to the model, differentiable, exportable, saved and loaded, dynamic where asked."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import mhc_compile
from mhc_compile.errors import NoSiteError, OptionError
from mhc_compile.model import hyper_connections
from mhc_compile.standalone import StandaloneGraph
from tests.tiny import Tiny, compiled, ids, loss_of, tiny


class Odd(nn.Module):
    """Keyword and nested inputs, a buffer, a loose tensor, a region without gradients, an unused input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8))
        self.loose = torch.linspace(-1, 1, 8)

    def forward(self, x: Tensor, pair: tuple[Tensor, Tensor], unused: Tensor, *, shift: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            norm = x.abs().mean(-1, keepdim=True) + 1
        x = x + torch.tanh(self.first(x)) / norm * self.scale
        x = x + self.second(x) * self.loose + pair[0] * pair[1]
        return {"out": x + shift}


def odd_inputs() -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, dict[str, Tensor]]:
    torch.manual_seed(2)
    x = torch.randn(2, 3, 8)
    return x, (torch.randn(8), torch.randn(8)), torch.zeros(1), {"shift": torch.randn(8)}


def test_equals_the_plain_model_and_leaves_it_alone() -> None:
    model = tiny()
    before = set(model.state_dict())
    graph = mhc_compile.standalone(model, ids())
    assert set(model.state_dict()) == before
    (logits,) = graph(ids())
    torch.testing.assert_close(logits, model(ids()), rtol=1e-5, atol=1e-5)


def test_equals_the_compiled_model_bit_for_bit() -> None:
    model = tiny()
    mhc_compile.prepare(model, ids(), init="paper")
    (logits,) = mhc_compile.standalone(model, ids(), init="paper")(ids())
    assert torch.equal(logits, compiled(model, init="paper")(ids()))


def test_names_and_parameters_are_the_models() -> None:
    model = tiny()
    graph = mhc_compile.standalone(model, ids())
    mine = dict(graph.named_parameters())
    assert all(mine[name] is value for name, value in model.named_parameters())
    fresh = set(mine) - set(dict(model.named_parameters()))
    mhc_compile.prepare(model, ids())
    prepared = {f"{name}.{key}" for name, module in hyper_connections(model) for key, _ in module.named_parameters()}
    assert fresh == prepared


def test_trains() -> None:
    graph = mhc_compile.standalone(tiny(), ids())
    loss_of(graph(ids())[0]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in graph.parameters())


def test_inputs_keep_their_order_and_names() -> None:
    model = Odd()
    x, pair, unused, keywords = odd_inputs()
    graph = mhc_compile.standalone(model, x, pair, unused, keywords)
    names = [str(node.target) for node in graph.graph.find_nodes(op="placeholder")]
    assert names == ["x", "pair_0", "pair_1", "unused", "shift"]
    want = model(x, pair, unused, **keywords)["out"]
    torch.testing.assert_close(graph(x, *pair, unused, keywords["shift"])[0], want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(graph(x, *pair, unused=unused, **keywords)[0], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_callers_grad_mode_holds(enabled: bool) -> None:
    x, pair, unused, keywords = odd_inputs()
    with torch.set_grad_enabled(not enabled):  # traced in the other mode
        graph = mhc_compile.standalone(Odd(), x, pair, unused, keywords)
    with torch.set_grad_enabled(enabled):
        (out,) = graph(x, *pair, unused, keywords["shift"])
        assert torch.is_grad_enabled() is enabled
        assert out.requires_grad is enabled


def test_grad_mode_is_back_after_an_error() -> None:
    x, pair, unused, keywords = odd_inputs()
    graph = mhc_compile.standalone(Odd(), x, pair, unused, keywords)
    with pytest.raises((RuntimeError, ValueError)):
        graph(torch.randn(2, 3, 9), *pair, unused, keywords["shift"])
    assert torch.is_grad_enabled()


def test_saved_loaded_pickled_and_copied() -> None:
    x, pair, unused, keywords = odd_inputs()
    graph = mhc_compile.standalone(Odd(), x, pair, unused, keywords)
    inputs = (x, *pair, unused, keywords["shift"])
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    for other in (
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(graph)),
        copy.deepcopy(graph),
    ):
        assert isinstance(other, StandaloneGraph)
        assert torch.equal(other(*inputs)[0], graph(*inputs)[0])
        assert list(other.state_dict()) == list(graph.state_dict())
        assert [n.name for n in other.graph.nodes] == [n.name for n in graph.graph.nodes]


def test_exports() -> None:
    graph = mhc_compile.standalone(tiny().eval(), ids())
    program = torch.export.export(graph, (ids(),))
    assert torch.equal(program.module()(ids())[0], graph(ids())[0])


@pytest.mark.parametrize("how", ["argument", "mark"])
def test_a_dynamic_axis(how: str) -> None:
    model, example = tiny(), ids()
    if how == "mark":
        torch._dynamo.mark_dynamic(example, 1)
    graph = mhc_compile.standalone(model, example, dynamic={0: 1} if how == "argument" else None)
    assert graph.dynamic == {0: (1,)}
    assert pickle.loads(pickle.dumps(graph)).dynamic == {0: (1,)}
    for length in (3, 9):
        torch.testing.assert_close(graph(ids(2, length))[0], model(ids(2, length)), rtol=1e-5, atol=1e-5)
    if how == "argument":
        assert not hasattr(example, "_dynamo_dynamic_indices")


@pytest.mark.parametrize("dynamic", [{1: 0}, {"x": 0}, {0: 7}])
def test_a_dynamic_axis_that_is_not_there(dynamic: dict[int | str, int]) -> None:
    with pytest.raises(OptionError, match="dynamic names"):
        mhc_compile.standalone(tiny(), ids(), dynamic=dynamic)


def test_a_dynamic_axis_that_the_model_fixes() -> None:
    class Fixed(Tiny):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + torch.zeros(5, 1)

    with pytest.raises(OptionError, match="the model fixes it to 5"):
        mhc_compile.standalone(Fixed(), ids(2, 5), dynamic={0: 1})


def test_a_model_without_sites_is_refused() -> None:
    with pytest.raises(NoSiteError):
        mhc_compile.standalone(nn.Linear(4, 4), torch.zeros(2, 4))
