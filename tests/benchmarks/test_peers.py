"""The peers' chains: what is fed to TileKernels means what the spelled-out chain means."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers, site, step
from benchmarks.chain import (
    chained,
    errors,
    make_inputs,
    rms_norm,
    spelled,
    spelled_coefficients,
    spelled_post,
    spelled_pre,
    spelled_transposed,
)

Pair = tuple[Callable[..., Any], Callable[..., Tensor]]


def from_references(reference: Any) -> Pair:
    """``mhc_pre`` and ``mhc_post`` in the order of TileKernels' functional.py, from its references in plain torch."""

    def mhc_pre(
        residual: Tensor,
        fn: Tensor,
        scale: Tensor,
        base: Tensor,
        *,
        norm_eps: float,
        mhc_mult: int,
        post_mult_value: float,
        pre_eps: float,
        sinkhorn_eps: float,
        sinkhorn_repeat: int,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        mixes = reference.mhc_pre_norm_fn_ref(residual, fn, None, norm_eps)
        pre, post, comb = reference.mhc_pre_split_mixes_ref(mixes, scale, base, mhc_mult, post_mult_value, pre_eps)
        comb = reference.sinkhorn_normalize_ref(comb, repeat=sinkhorn_repeat, eps=sinkhorn_eps)
        return reference.mhc_pre_apply_mix_ref(residual, pre), (post, comb)

    return mhc_pre, reference.mhc_post_ref


def restated() -> Any:
    """What the references of TileKernels 1.0 compute, restated: without the package this much can be checked."""

    def norm_fn(x: Tensor, fn: Tensor, weight: None, eps: float) -> Tensor:
        flat = x.flatten(2).float()
        return flat @ fn.T * (flat.square().mean(-1, keepdim=True) + eps).rsqrt()

    def split(mixes: Tensor, scale: Tensor, base: Tensor, n: int, value: float, eps: float) -> tuple[Tensor, ...]:
        pre, post, comb = (mixes * scale.repeat_interleave(torch.tensor([n, n, n * n])) + base).split([n, n, n * n], -1)
        return pre.sigmoid()[..., None] + eps, post.sigmoid()[..., None] * value, comb.unflatten(-1, (n, n))

    def sinkhorn(comb: Tensor, repeat: int, eps: float) -> Tensor:
        comb = comb.softmax(-1) + eps
        for half in range(2 * repeat - 1):
            comb = comb / (comb.sum(-1 if half % 2 else -2, keepdim=True) + eps)
        return comb

    def post(y: Tensor, x: Tensor, h_post: Tensor, comb: Tensor) -> Tensor:
        mixed = torch.einsum("abmn,abmc->abnc", comb, x.float())
        return (y.float().unsqueeze(-2) * h_post + mixed).bfloat16()

    return types.SimpleNamespace(
        mhc_pre_norm_fn_ref=norm_fn,
        mhc_pre_split_mixes_ref=split,
        sinkhorn_normalize_ref=sinkhorn,
        mhc_pre_apply_mix_ref=lambda x, mix: (x * mix).sum(-2).bfloat16(),
        mhc_post_ref=post,
    )


def check(pair: Pair) -> None:
    x, sites = make_inputs(24, 64, 2, device="cpu")
    error = errors(chained(peers.tile_kernels_functions(*pair)), spelled_transposed, x, sites, checked=8)
    # A bf16 chain of two sites; the transposed mix taken the other way round is wrong by a half.
    assert error["output"] < 0.01, error
    assert error["dx"] < 0.02, error
    assert max(error.values()) < 0.1, error


def test_tile_kernels_as_restated() -> None:
    check(from_references(restated()))


def test_the_transpose_matters() -> None:
    reference = restated()
    post = reference.mhc_post_ref
    reference.mhc_post_ref = lambda y, x, h_post, comb: post(y, x, h_post, comb.mT)
    with pytest.raises(AssertionError):
        check(from_references(reference))


@pytest.mark.skipif(importlib.util.find_spec("tile_kernels") is None, reason="TileKernels is not installed")
def test_tile_kernels_references() -> None:
    check(from_references(peers.import_tile_kernels("tile_kernels.torch.mhc")))


def test_peers_that_are_not_installed_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    for chain in (peers.liger_site, peers.liger_chain, peers.tile_kernels_site, peers.tile_kernels_chain):
        reason = chain()
        assert isinstance(reason, str)
        assert reason.startswith("not measured: ")
        assert "No module named" in reason


def test_liger_is_called_around_the_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins of its functions in plain torch: it takes phi the other way round and mixes by ``comb`` itself."""

    def coeffs(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor, **settings: Any) -> tuple[Tensor, ...]:
        assert all(alpha.dim() == 0 for alpha in alphas)
        assert (settings["tmax"], settings["post_mult"], settings["allow_fp32"]) == (20, 2.0, False)
        return spelled_coefficients(x, (phi.t(), bias, *alphas))

    functional = types.SimpleNamespace(
        liger_mhc_coeffs=coeffs,
        liger_mhc_pre=spelled_pre,
        liger_mhc_post_res=lambda x, y, post, res: spelled_post(x, y, post, res, transpose=False),
        liger_rms_norm=lambda u, weight, eps: rms_norm(u, weight),
    )
    monkeypatch.setattr(peers.importlib, "import_module", lambda name: functional)
    chain = peers.liger_chain()
    assert not isinstance(chain, str)
    x, sites = make_inputs(24, 64, 2, device="cpu")
    assert torch.equal(chain(x, sites), spelled(x, sites))


def test_an_extra_installs_the_peers() -> None:
    """The versions that were seen to work together; version 2 of TileKernels is the one that cannot be measured."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = {one.partition(";")[0].strip() for one in project["optional-dependencies"]["peers"]}
    assert wanted == {
        "liger-kernel>=0.8", "tile-kernels<2", "tilelang", "apache-tvm-ffi<0.1.13", "z3-solver<4.15.5",
        "torch-c-dlpack-ext",
    }  # fmt: skip
    for module in (site, step):
        assert "pip install -e '.[peers]'" in str(module.__doc__)


def test_version_two_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> types.ModuleType:
        raise ModuleNotFoundError("No module named 'tile_kernels.modeling.mhc'", name="tile_kernels.modeling.mhc")

    monkeypatch.setattr(peers.importlib, "import_module", missing)
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "2.1.0")
    assert "2.1.0 has no autograd functions" in str(peers.tile_kernels_chain())


def test_the_second_import_finds_the_moved_function(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> types.ModuleType:
        asked.append(name)
        if name == "tilelang.backend.target":
            return types.SimpleNamespace(determine_target="moved")  # type: ignore[return-value]  # stands for a module
        if "tilelang.utils.target" not in sys.modules:
            raise ModuleNotFoundError("No module named 'tilelang.utils.target'", name="tilelang.utils.target")
        return types.ModuleType(name)

    monkeypatch.setattr(peers.importlib, "import_module", load)
    monkeypatch.delitem(sys.modules, "tilelang.utils.target", raising=False)
    try:
        assert peers.import_tile_kernels("tile_kernels.x").__name__ == "tile_kernels.x"
        assert asked == ["tile_kernels.x", "tilelang.backend.target", "tile_kernels.x"]
        assert sys.modules["tilelang.utils.target"].determine_target == "moved"
    finally:
        sys.modules.pop("tilelang.utils.target", None)


def test_a_broken_peer_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def load(name: str) -> types.ModuleType:
        asked.append(name)
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(peers.importlib, "import_module", load)
    assert "libcuda" in str(peers.tile_kernels_chain())
    assert len(asked) == 1
