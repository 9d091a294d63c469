"""The two launches of a site with few tokens against the native bodies in float64, under Triton's interpreter: see
test_interpreter.py. Uninitialised memory is filled with NaN."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile import ops
from mhc_compile.config import FUSIONS, Options
from mhc_compile.lowering import (
    activate_beside_norm,
    activate_pre_norm,
    coefficients,
    few_tokens,
    post,
    post_project,
    pre_norm,
)
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from tests.lowering.graphs import close, lowered
from tests.lowering.interpreted_cases import NORMS, RMS, check, double

pytestmark = pytest.mark.usefixtures("poisoned")
SIZES = [
    (4, 50, torch.bfloat16, (2, 2)),
    (4, 300, torch.bfloat16, (17,)),
    (4, 64, torch.bfloat16, (64,)),
    (4, 65, torch.bfloat16, (70,)),
    (3, 33, torch.float32, (3,)),
    (2, 129, torch.float16, (17,)),
    (8, 40, torch.bfloat16, (3,)),
    (1, 24, torch.float32, (1,)),
    (4, 50, torch.bfloat16, (1,)),
    (4, 50, torch.bfloat16, (0,)),
]
SPECS = {
    "default": {"sinkhorn": SinkhornSpec(steps=4)},
    "outside": {"layout": "pre,res,post", "norm": "rms_outside", "norm_eps": 1e-3, "res": "linear", "sinkhorn": None},
    "pre only": {"layout": "pre", "norm": "none", "res": "none", "sinkhorn": None},
    "identity": {"layout": "pre,post", "res": "none", "sinkhorn": None},
    "linear gate": {"gate": "linear", "sinkhorn": SinkhornSpec(steps=3), "mix_dtype": torch.bfloat16},
}


def spec_and_parameters(which: str, n: int, width: int, dtype: torch.dtype) -> tuple[CoefficientSpec, list[Any]]:
    """The spec and phi, bias, the three alphas."""
    spec = CoefficientSpec(streams=n, **SPECS[which])
    phi = (torch.randn(spec.rows, n * width) * 0.2).to(dtype)
    return spec, [phi, torch.randn(spec.rows), torch.tensor(0.7), torch.tensor([0.9]), torch.tensor(0.5)]


@pytest.mark.parametrize(
    ("n", "width", "dtype", "lead", "phi_dtype"),
    [(*size, torch.float32) for size in SIZES] + [(*SIZES[index], torch.bfloat16) for index in (0, 4, 5)],
)
def test_post_project(n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...], phi_dtype: torch.dtype) -> None:
    """X' has the bits of post; the sums over the splits are phi X' and the squares of X' as it was written."""
    spec, (phi, *_) = spec_and_parameters("default", n, width, phi_dtype)
    x, y = torch.randn(*lead, n, width).to(dtype), torch.randn(*lead, width).to(dtype)
    q, h = torch.randn(*lead, n), torch.randn(*lead, n, n)
    padded = coefficients.padded_rows(spec)
    for mix, transpose in ((h, False), (h, True), (None, False)):
        state, partial = post_project.forward(x, y, q, mix, transpose, phi, padded)
        assert torch.equal(state, post.forward(x, y, q, mix, transpose))
        wide = state.double().reshape(-1, n * width)
        assert partial.shape == (post_project.splits_of(width, n, padded), wide.shape[0], padded)
        assert torch.isfinite(partial).all()
        total = partial.double().sum(0)
        check(total[:, : spec.rows], wide @ phi.double().t(), 2e-5)
        check(total[:, spec.rows], wide.square().sum(-1), 2e-6)


def both(x: Tensor, given: Tensor | None, spec: CoefficientSpec, parameters: list[Any], norm: tuple[Any, ...]) -> Any:
    """(what the launch should give, in float64) by the native bodies."""
    flat = spec.op_arguments().values()
    pre, post_, res, projection = ops.coefficients.native(double(x), *map(double, parameters), *flat)
    weight, bias, kind, *attributes = norm
    gate = pre if given is None else given.double()
    if kind == "none":
        return ops.pre.native(double(x), gate), None, pre, post_, res, projection
    out, statistics, _ = ops.pre_norm.native(double(x), gate, double(weight), double(bias), kind, *attributes)
    return out, statistics, pre, post_, res, projection


@pytest.mark.parametrize(
    ("which", "norm", "size"),
    [
        *(("default", "llama", size) for size in SIZES),
        *(("default", "none", size) for size in (SIZES[0], SIZES[4], SIZES[6])),
        *((which, norm, SIZES[index]) for which in SPECS for norm, index in (("gemma", 0), ("layer", 4), ("none", 1))),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_activate_pre_norm(which: str, norm: str, size: Any, known: bool) -> None:
    """`known`: the gate of the mix is given, as in `single_pass`."""
    n, width, dtype, lead = size
    spec, parameters = spec_and_parameters(which, n, width, torch.float32)
    x = torch.randn(*lead, n, width).to(dtype)
    given = torch.randn(*lead, n) if known else None
    kind, offset, round_first, weighted, biased = NORMS.get(norm, ("none", 0.0, False, False, False))
    weight = (torch.randn(width) * 0.3 + 1 - offset).to(dtype) if weighted else None
    bias = torch.randn(width).to(dtype) if biased else None
    partial = coefficients.partials(x, parameters[0], spec)
    args = (kind, 1e-5, offset, round_first)
    want = both(x, given, spec, parameters, (weight, bias, *args))
    for store in (True, False):
        got = activate_pre_norm.forward(
            partial, *parameters[1:], x, given, weight, bias, *args, store, store, *spec.op_arguments().values()
        )
        # A mix of values of both signs may cancel: the statistics of a rounded row are as good as the row.
        check(got[0], want[0], 3 * RMS[dtype])
        if want[1] is not None:
            check(got[1], want[1].flatten(0, -2), 3 * RMS[dtype])
        if store and norm != "none":  # training: what a recompute plan rebuilds has the bits of the first
            gate = got[2].reshape(*lead, n) if given is None else given
            again = pre_norm.forward(x, gate, weight, bias, *args)
            assert torch.equal(got[0], again[0])
            assert torch.equal(got[1], again[1].flatten(0, -2))
        for index in (2, 5):
            assert got[index].numel() == 0 or store
        for index in (2, 3, 4, 5) if store else (3, 4):
            exact = want[index].reshape(got[index].shape)
            check(got[index], exact, 1e-2 if spec.mix_dtype and index in (3, 4) else 3e-5)


def test_many_splits_of_the_channels() -> None:
    """Partial sums of the other launch, more of them than a power of two, and a row wider than a block."""
    n, width = 4, 2100
    spec, parameters = spec_and_parameters("default", n, width, torch.float32)
    spec = dataclasses.replace(spec, sinkhorn=SinkhornSpec())
    parameters[0] = parameters[0] * 0.1
    x, y = torch.randn(3, n, width).bfloat16(), torch.randn(3, width).bfloat16()
    state, partial = post_project.forward(
        x, y, torch.randn(3, n), torch.randn(3, n, n), False, parameters[0], coefficients.padded_rows(spec)
    )
    assert partial.shape[0] == 36
    norm = ("rms", 1e-6, 0.0, True)
    weight = torch.randn(width).bfloat16()
    want = both(state, None, spec, parameters, (weight, None, *norm))
    got = activate_pre_norm.forward(
        partial, *parameters[1:], state, None, weight, None, *norm, True, True, *spec.op_arguments().values()
    )
    check(got[0], want[0], 0.015)
    check(got[2:], want[2:], 3e-5)


# ------------------------------------------------------------------------------------------------ whole graphs
CHAINS = {
    name: (spec.rows, spec.op_arguments())  # made here: Dynamo of torch 2.11 cannot trace the making of a spec
    for name, spec in {
        "mhc": CoefficientSpec(streams=4, sinkhorn=SinkhornSpec(steps=4)),
        "identity": CoefficientSpec(streams=4, layout="pre,post", res="none", sinkhorn=None),
    }.items()
}


def chain(x: Tensor, w: Tensor, sites: list[tuple[Tensor, ...]], variant: str = "mhc", norm: str = "rms") -> Tensor:
    """expand, sites around a small branch, collapse. `variant`: whose gate a mix has, and whether there is a res."""
    rows, attributes = CHAINS["identity" if variant == "identity" else "mhc"]
    state = torch.ops.mhc.expand.default(x, 4)
    known = torch.full((*x.shape[:-1], 4), 0.25, dtype=torch.float32, device=x.device)
    for phi, bias, a, b, c, weight in sites:
        res_alpha = None if variant == "identity" else c
        own, post_, res, _ = torch.ops.mhc.coefficients.default(
            state, phi[:rows], bias[:rows], a, b, res_alpha, **attributes
        )
        gate, known = (known, own) if variant == "single_pass" else (own, known)
        if norm == "none":
            u = torch.ops.mhc.pre.default(state, gate)
        else:
            u, *_ = torch.ops.mhc.pre_norm.default(state, gate, weight, None, norm, 1e-6, 0.0, True)
        y = torch.nn.functional.silu(u @ w)
        state = torch.ops.mhc.post.default(state, y, post_, None if variant == "identity" else res, False)
    return torch.ops.mhc.collapse.default(state, "mean")


def chain_inputs(
    tokens: int, width: int = 32, count: int = 3, batch: int = 2
) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
    generator, device = torch.Generator("cpu").manual_seed(0), torch.get_default_device()

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cpu") * scale).to(device)

    sites = [
        (random(24, 4 * width, scale=0.1), random(24), *(torch.tensor(0.3 + 0.1 * i) for i in range(3)), random(width))
        for _ in range(count)
    ]
    return random(batch, tokens, width), random(width, width, scale=(8 * width) ** -0.5), sites


def launches(seen: list[Any]) -> list[str]:
    """The kernels of the forward graph, in order."""
    return [
        str(node.target).split(".")[1] for node in seen[0].graph.nodes if str(node.target).startswith("mhc_kernel.")
    ]


SITE = ["activate_pre_norm", "post_project"]


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity"])
@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_two_launches_a_site(variant: str, norm: str) -> None:
    """Three sites: `project` for the first state and two launches for each site. The same numbers as in float64."""
    log, seen = LoweringLog(), []
    x, w, sites = chain_inputs(5)
    function = lowered(functools.partial(chain, variant=variant, norm=norm), Options(), log, seen)
    with torch.no_grad():
        got = function(x, w, sites)
    exact = chain(double(x), double(w), [tuple(map(double, site)) for site in sites], variant, norm)
    check(got, exact, 1e-5)
    assert launches(seen) == ["project", *SITE, *SITE, "activate_pre_norm", "post_collapse"]
    assert log.counts()["few tokens", "fused"] == 3
    assert {entry.provider for entry in log.entries if entry.op not in ("expand", "collapse")} == {"triton", "fused"}


def test_more_launches_for_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four a site, or three where post makes its own coefficients, or the norm's launch makes them."""
    four = ["project", "activate", "pre_norm", "post"]
    without_ends = tuple(name for name in FUSIONS if name != "ends")
    monkeypatch.setattr(activate_beside_norm, "LEAST", 66)
    within = tuple(name for name in without_ends if name != "activate_post")
    neither = tuple(name for name in within if name != "activate_beside_norm")
    beside, post = ["project", "activate_beside_norm", "post"], ["project", "gate_pre_norm", "activate_post"]
    for fuse, site in ((neither, four), (within, beside), (without_ends, post)):
        torch._dynamo.reset()
        seen: list[Any] = []
        x, w, sites = chain_inputs(33, count=2)
        with torch.no_grad():
            lowered(chain, Options(fuse=fuse), LoweringLog(), seen)(x, w, sites)
        assert launches(seen) == 2 * site


def test_compiled_for_few_and_run_for_many() -> None:
    """The example chooses, no guard holds it: one graph with two launches a site serves every length."""
    seen: list[Any] = []
    function = lowered(chain, Options(), LoweringLog(), seen)
    for tokens in (3, 100, 17):
        x, w, sites = chain_inputs(tokens, count=2)
        torch._dynamo.mark_dynamic(x, 1)
        with torch.no_grad():
            check(function(x, w, sites), chain(double(x), double(w), [tuple(map(double, s)) for s in sites]), 1e-5)
    assert len(seen) == 1
    assert launches(seen) == ["project", *SITE, "activate_pre_norm", "post_collapse"]


@pytest.mark.parametrize("variant", ["mhc", "single_pass"])
def test_gradients_of_the_fused_forward(variant: str) -> None:
    """A training graph keeps pre and the projection for its backward."""
    x, w, sites = chain_inputs(4, count=2)
    seen: list[Any] = []
    call = lowered(functools.partial(chain, variant=variant), Options(), LoweringLog(), seen)

    def run(function: Any, cast: Any) -> list[Tensor]:
        leaves = [cast(t).detach().requires_grad_() for t in (x, w, *sites[0], *sites[1])]
        out = function(leaves[0], leaves[1], [tuple(leaves[2:8]), tuple(leaves[8:])])
        used = [leaf for index, leaf in enumerate(leaves) if (variant, index) not in UNUSED]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), used)]

    close(run(call, lambda t: t.clone()), run(functools.partial(chain, variant=variant), double), 1e-4)
    assert launches(seen) == ["project", *SITE, "activate_pre_norm", "post_collapse"]


UNUSED = {("single_pass", 10)}
"""(variant, leaf): the gate of pre of the last site mixes nothing in `single_pass`."""


def test_a_model_of_the_backend() -> None:
    """A converted model in inference: every site takes the two launches, and gives what it gives without them."""
    from mhc_compile.backend import mhc, reports
    from tests.tiny import ids, tiny

    outputs = []
    for few in (64, 0):
        torch._dynamo.reset()
        model = tiny(layers=1).eval()
        with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(few_tokens, "FEW", few)
            options = {"init": "paper", "sinkhorn_iters": 1}
            with torch._inductor.config.patch(force_disable_caches=True):
                outputs.append(torch.compile(model, backend=mhc, options=options, fullgraph=True)(ids()))
        assert reports[-1].log.counts()["few tokens", "fused"] == (2 if few else 0)
    check(outputs[0], outputs[1], 1e-5)
