"""The parameters of one site: shapes, starts, dtypes, devices, and what they say of themselves."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

import mhc_compile
from mhc_compile import ops
from mhc_compile.errors import CheckpointError
from mhc_compile.model import HyperConnection, hyper_connections
from mhc_compile.model.hyper_connection import registration_order
from tests.tiny import compiled, ids, loss_of, tiny

SPECS = {
    "mhc": ops.CoefficientSpec(),
    "two streams": ops.CoefficientSpec(streams=2),
    "identity": ops.CoefficientSpec(layout="pre,post", res="none", sinkhorn=None),
    "hc": ops.CoefficientSpec(gate="linear", post_scale=1.0, res="linear", sinkhorn=None),
    "head": ops.CoefficientSpec(layout="pre", res="none", sinkhorn=None),
    "mix dtype": ops.CoefficientSpec(mix_dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", SPECS)
def test_settings_there_and_back(name: str) -> None:
    module = HyperConnection(SPECS[name], 8, 3, "paper", variant="single_pass", collapse="learned")
    again = HyperConnection.from_settings(module.settings)
    assert again.describe() == module.describe()
    assert (again.position, again.init, again.spec) == (3, "paper", SPECS[name])
    assert [(k, v.shape) for k, v in again.state_dict().items()] == [
        (k, v.shape) for k, v in module.state_dict().items()
    ]
    assert not module.disagreement(again.describe())


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("position", [0, 1, 5])
def test_preserving_start(name: str, position: int) -> None:
    """Of equal streams the branch reads the stream itself, and writes its output once to each."""
    spec = SPECS[name]
    n = spec.streams
    module = HyperConnection(spec, 8, position, "preserve")
    stream = torch.randn(5, 8)
    streams = stream[:, None].expand(5, n, 8).contiguous()
    pre, post, res = module.coefficients(streams)
    assert torch.allclose((pre[..., None] * streams).sum(-2), stream, atol=1e-6)
    if name != "head":
        assert torch.allclose(post.float(), torch.ones(5, n), atol=1e-6)
        assert not torch.allclose(pre, pre[:, :1].expand(-1, n)), "every stream is read alike: they would never part"
        assert int(pre[0].argmax()) == position % n
    if "res" in spec.parts:
        assert torch.allclose(res.float().sum(-1), torch.ones(5, n), atol=1e-2 if spec.mix_dtype else 1e-5)


def test_unreadable_settings() -> None:
    for text in (b"", b"{}", b"[1]", b"\xff\xff", b'{"format": 99, "spec": {}}'):
        with pytest.raises(CheckpointError):
            HyperConnection.from_settings(torch.tensor(list(text), dtype=torch.uint8))
    module = HyperConnection(SPECS["mhc"], 8, 0, "preserve")
    newer = bytes(module.settings.tolist()).replace(b'"format": 1', b'"format": 2')
    with pytest.raises(CheckpointError, match="newer"):
        HyperConnection.from_settings(torch.tensor(list(newer), dtype=torch.uint8))


@pytest.mark.parametrize(
    "move", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.half)]
)
def test_dtype_stays_float32(move: object) -> None:
    model = tiny(layers=1)
    mhc_compile.prepare(model, ids())
    before = {name: hc.bias.detach().clone() for name, hc in hyper_connections(model)}
    settings = model.layers[0].mhc0.settings.clone()
    assert move(model) is model  # type: ignore[operator]  # a method of nn.Module
    assert model.head.weight.dtype != torch.float32
    for name, hc in hyper_connections(model):
        assert all(p.dtype == torch.float32 for p in hc.parameters())
        assert torch.equal(hc.bias, before[name])
    assert torch.equal(model.layers[0].mhc0.settings, settings)
    output = compiled(model)(ids())
    assert output.dtype == model.head.weight.dtype
    loss_of(output).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad.dtype == torch.float32 for _, hc in hyper_connections(model) for p in hc.parameters())


@pytest.mark.parametrize("init", ["preserve", "paper"])
def test_meta_device(init: str) -> None:
    with torch.device("meta"):
        model = tiny(layers=1)
        mhc_compile.prepare(model, ids().to("meta"), init=init)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    model.to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.no_grad(), mhc_compile.plain():
        want = model(ids())
    got = compiled(model, init=init)(ids())
    assert torch.isfinite(got).all()
    if init == "preserve":
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-6)
    else:
        assert all(hc.phi.std() > 0.01 for _, hc in hyper_connections(model))
    mhc_compile.load_state_dict(tiny(layers=1), mhc_compile.state_dict(model))


def test_meta_model_takes_a_checkpoint() -> None:
    """``assign=True``, as large models are loaded."""
    model = tiny(layers=1)
    mhc_compile.prepare(model, ids())
    want = compiled(model)(ids())
    with torch.device("meta"):
        fresh = tiny(layers=1)
    mhc_compile.load_state_dict(fresh, mhc_compile.state_dict(model), assign=True)
    assert {p.device.type for p in fresh.parameters()} == {"cpu"}
    assert torch.equal(compiled(fresh)(ids()), want)


def test_paper_start_differs_by_site_and_by_seed() -> None:
    def phis(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return [HyperConnection(SPECS["mhc"], 8, position, "paper").phi.detach() for position in (0, 1)]

    (a, b), (c, _), (d, _) = phis(0), phis(0), phis(1)
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    assert not torch.equal(a, d)


def test_construction_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    HyperConnection(SPECS["mhc"], 8, 0, "paper")
    assert torch.equal(torch.get_rng_state(), state)


def test_disagreement_names_the_first() -> None:
    module = HyperConnection(SPECS["mhc"], 8, 0, "preserve")
    other = HyperConnection(dataclasses.replace(SPECS["mhc"], norm_eps=1e-5), 8, 0, "preserve")
    assert module.disagreement(other.describe()) == "norm_eps=1e-06, not the 1e-05"


def test_small_things() -> None:
    module = HyperConnection(SPECS["mhc"], 8, 2, "preserve")
    assert "streams=4, width=8" in repr(module)
    assert module.bytes() == 4 * (24 * 32 + 24 + 3)
    assert [name for name, _ in hyper_connections(nn.Sequential(copy.deepcopy(module), nn.Linear(2, 2)))] == ["0"]
    names = ["mhc_head", "mhc10", "mhc2", "mhc0"]
    assert sorted(names, key=registration_order) == ["mhc0", "mhc2", "mhc10", "mhc_head"]
