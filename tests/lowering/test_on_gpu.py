"""The kernels on a device: interpreted_cases.py, a compiled site of any length, more than 2^31 elements."""

from __future__ import annotations

import functools
import io
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from mhc_compile import ops
from mhc_compile.compat import triton_version

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (torch.cuda.is_available() and triton_version()), reason="needs a CUDA device and Triton"),
]

if torch.cuda.is_available() and triton_version():
    from tests.lowering import (
        interpreted_cases,
        interpreted_errors,
        interpreted_few_tokens,
        interpreted_ops,
        interpreted_strides,
    )

    every: dict[str, Any] = {}
    for module in (interpreted_cases, interpreted_errors, interpreted_few_tokens, interpreted_ops, interpreted_strides):
        every |= vars(module)
    cases = {name: value for name, value in every.items() if name.startswith("test_")}
    for name in ("the_interpreter_is_on", "a_model_of_the_backend", "a_model_that_keeps_phi_as_the_paper_does"):
        del cases[f"test_{name}"]
    # A module's marks stay with the module.
    globals().update({name: pytest.mark.usefixtures("poisoned")(value) for name, value in cases.items()})


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        yield


SPEC = ops.CoefficientSpec(streams=4).op_arguments()


def site(x: Any, phi: Any, bias: Any, alpha: Any, weight: Any) -> Any:
    pre, post, res, _ = torch.ops.mhc.coefficients.default(x, phi, bias, alpha, alpha, alpha, **SPEC)
    y, *_ = torch.ops.mhc.pre_norm.default(x, pre, weight, None, "rms", 1e-6, 0.0, True)
    return torch.ops.mhc.post.default(x, y, post, res, False)


@pytest.mark.parametrize("mode", ["plain", "cudagraphs"])
def test_compiled_site_for_every_length(mode: str) -> None:
    """One compile serves all lengths from 2 on; 0 and 1 have their own. Against the native bodies in float64."""
    from mhc_compile.config import Options
    from mhc_compile.lowering.base import LoweringLog
    from mhc_compile.lowering.inductor import config_patches

    log = LoweringLog()
    patches: Any = config_patches(Options(), log) | {"triton.cudagraphs": mode == "cudagraphs"}
    compiled = torch.compile(site, fullgraph=True, options=patches)
    n, width = 4, 384
    parameters = [torch.randn(24, n * width) * 0.05, torch.randn(24), torch.full((1,), 0.4), torch.randn(width)]
    for batch, tokens in ((2, 64), (2, 7), (2, 1), (2, 0), (2, 3000), (1, 64), (1, 1), (1, 0)):
        x = torch.randn(batch, tokens, n, width).to(torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 1) if tokens > 1 else None
        results = []
        for function, dtype in ((site, torch.float64), (compiled, None)):
            leaves = [value.to(dtype or value.dtype).requires_grad_() for value in (x, *parameters[:3])]
            weight = parameters[3].to(torch.bfloat16).to(dtype or torch.bfloat16).requires_grad_()
            for _ in range(3):  # the second call records a CUDA graph, the third replays it
                torch.compiler.cudagraph_mark_step_begin()
                out = function(*leaves, weight)
                gradients = torch.autograd.grad(out.double().square().sum(), [*leaves, weight])
            results.append([value.double().clone() for value in (out, *gradients)])
        for exact, got in zip(*results, strict=True):
            assert float((exact - got).norm()) <= 0.02 * float(exact.norm()), (batch, tokens)
    apart = {entry.op for entry in log.entries if entry.provider not in ("triton", "fused")}
    assert apart <= {"activate + pre_norm"}, log.entries  # with few tokens they stay two kernels


@pytest.mark.parametrize("kind", ["mhc", "single_pass", "single_pass, u kept"])
def test_three_sites_of_one_length(kind: str) -> None:
    """Two boundaries against float64; torch has read off every kernel which tensors it writes (what it cannot read it
    takes for written, and copies)."""
    kept = "kept" in kind
    from mhc_compile.config import Options
    from mhc_compile.lowering.base import LoweringLog
    from mhc_compile.lowering.inductor import config_patches

    def sites(x: Any, phi: Any, bias: Any, alpha: Any, weight: Any) -> Any:
        gate = torch.full(x.shape[:-1], 0.25, device=x.device)
        for _ in range(3):
            pre, post, res, _ = torch.ops.mhc.coefficients.default(x, phi, bias, alpha, alpha, alpha, **SPEC)
            mix = pre if kind == "mhc" else gate
            y, *_ = torch.ops.mhc.pre_norm.default(x, mix, weight, None, "rms", 1e-6, 0.0, True, kept)
            x, gate = torch.ops.mhc.post.default(x, y, post, res, False), pre
        return x

    log, said = LoweringLog(), io.StringIO()
    patches: Any = config_patches(Options(), log)
    logger, handler = logging.getLogger("torch._higher_order_ops.triton_kernel_wrap"), logging.StreamHandler(said)
    logger.addHandler(handler)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(sites, fullgraph=True, options=patches)
        x = torch.randn(2, 50, 4, 384).to(torch.bfloat16)
        tensors = [x, torch.randn(24, 4 * 384) * 0.05, torch.randn(24), torch.full((1,), 0.4)]
        weight = torch.randn(384).to(torch.bfloat16)
        results = []
        for function, dtype in ((sites, torch.float64), (compiled, None)):
            leaves = [value.to(dtype or value.dtype).requires_grad_() for value in (*tensors, weight)]
            out = function(*leaves)
            results.append([out, *torch.autograd.grad(out.double().square().sum(), leaves)])
    finally:
        logger.removeHandler(handler)
    for exact, got in zip(*results, strict=True):
        assert float((exact - got.double()).norm()) <= 0.02 * float(exact.norm())
    assert log.counts()["site boundary", "fused"] == 2
    assert sum("gradient of the gate" in entry.reason for entry in log.entries) == (2 if kept else 0)
    assert "Encountered an exception" not in said.getvalue(), said.getvalue()


@pytest.mark.parametrize(("width", "dtype", "kind"), [
    (2560, torch.bfloat16, "rms"), (4096, torch.bfloat16, "rms"), (4095, torch.bfloat16, "layer"),
    (4096, torch.float16, "layer"), (2560, torch.float32, "rms"),
])  # fmt: skip
def test_a_block_of_sites_has_the_bits_of_its_sites(width: int, dtype: torch.dtype, kind: str) -> None:
    """`replay_normed` against `post_pre_norm` and `post`, and against `post` and `pre_norm` of the forward, where a row
    is as wide as in a model."""
    from mhc_compile.lowering import post, pre_norm

    tokens, n = 301, 4
    x, norm = torch.randn(tokens, n, width).to(dtype), (kind, 1e-6, 0.0, True)
    sites = [
        {
            "y": torch.randn(tokens, width).to(dtype), "q": torch.randn(tokens, n), "h": torch.randn(tokens, n, n) / n,
            "p": torch.randn(tokens, n), "weight": torch.randn(width).to(dtype),
            "bias": torch.randn(width).to(dtype) if kind == "layer" else None,
        }
        for _ in range(4)
    ]  # fmt: skip
    for some in (sites, [sites[0], dict(sites[1], p=None), sites[2]]):
        states, results = interpreted_cases.site_after_site(x, some, False, norm, True)
        got = interpreted_cases.replayed(x, some, False, norm, True, [True] * len(some))
        for index, (one, other) in enumerate(zip(got, states + results, strict=True)):
            assert torch.equal(one, other), index
    got = interpreted_cases.replayed(x, sites, False, norm, True, [True] * 4)
    state = x
    for index, site in enumerate(sites):
        state = post.forward(state, site["y"], site["q"], site["h"], False)
        made = pre_norm.forward(state, site["p"], site["weight"], site["bias"], *norm, True)
        again = (got[index], *got[4 + 3 * index : 7 + 3 * index])
        assert all(torch.equal(one, other) for one, other in zip(again, (state, *made), strict=True)), index


class Layers(torch.nn.Module):
    """Pre-norm layers whose backward repeats itself: [B, T, C] -> [B, T, C]."""

    def __init__(self, layers: int = 3, width: int = 256) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(width) for _ in range(2 * layers))
        self.inner = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(2 * layers))

    def forward(self, x: Any) -> Any:
        for index, (norm, inner) in enumerate(zip(self.norms, self.inner, strict=True)):
            y = inner(norm(x))
            x = x + (y.roll(1, 1) if index % 2 else torch.nn.functional.silu(y))
        return x


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity"])
def test_recompute_gives_the_same_bits(variant: str) -> None:
    """Output and gradients, two steps each, with every state kept and with a plan that keeps two of them."""
    from mhc_compile.backend import mhc, reports

    results = []
    for recompute in ("off", 2 * 2 * 96 * 4 * 256 * 2):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Layers().to(torch.bfloat16), torch.randn(2, 96, 256).to(torch.bfloat16).requires_grad_()
        options = {"variant": variant, "recompute": recompute, "init": "paper"}
        compiled = torch.compile(model, backend=mhc, options=options, fullgraph=True)
        found = []
        for _ in range(2):
            out = compiled(x)
            out.float().square().sum().backward()
            found.append(out.detach())
        results.append([*found, x.grad, *(one.grad for _, one in sorted(model.named_parameters()))])
        changed = next(one.changed for one in reports[-1].passes if one.name == "recompute")
        assert (changed > 0) == (recompute != "off")
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)


@pytest.mark.parametrize(
    ("variant", "dtype", "tokens"),
    [
        *((variant, torch.bfloat16, tokens) for tokens in (1024, 32) for variant in ("mhc", "single_pass")),
        ("identity", torch.bfloat16, 1024),
        ("mhc", torch.float32, 1024),
        ("single_pass", torch.float16, 1024),
    ],
)
def test_the_logits_alone_give_the_same_bits(
    variant: str, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and gradients, two steps each: every coefficient kept, made again from its logits, and (in 16 bits) with
    nothing replayed at all. A site with few tokens has another kernel, which there is no second one for: both are
    kept."""
    from torch._inductor import config as inductor

    from mhc_compile.backend import mhc, reports
    from mhc_compile.passes import logits
    from mhc_compile.passes.recompute import RecomputeResult

    results = []
    for form in ("off", "coefficients", "logits"):
        torch._dynamo.reset()
        torch.manual_seed(0)
        monkeypatch.setattr(logits, "FORMS", (form,) if form != "off" else ("coefficients",))
        model, x = Layers().to(dtype), torch.randn(2, tokens // 2, 256).to(dtype).requires_grad_()
        states = 2 * tokens * 4 * 256 * dtype.itemsize
        options = {"variant": variant, "recompute": "off" if form == "off" else states, "init": "paper"}
        compiled = torch.compile(model, backend=mhc, options=options, fullgraph=True)
        found = []
        with inductor.patch(force_disable_caches=True):  # what is lowered is to be seen in the log
            for _ in range(2):
                out = compiled(x)
                out.float().square().sum().backward()
                found.append(out.detach())
        results.append([*found, x.grad, *(one.grad for _, one in sorted(model.named_parameters()))])
        plan = next(one for one in reports[-1].passes if isinstance(one, RecomputeResult))
        assert plan.logits.chosen == (form == "logits" and tokens > 64), plan.logits.refusal
        again = reports[-1].log.counts()["activate", "triton"]
        assert (again > 0) == plan.logits.chosen
    for off, both, alone in zip(*results, strict=True):
        assert torch.equal(off, both) or dtype == torch.float32
        assert torch.equal(both, alone)


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity"])
@pytest.mark.parametrize("mode", ["plain", "cudagraphs"])
def test_compiled_chain_with_few_tokens(mode: str, variant: str) -> None:
    """Two launches a site at 1, 8 and 64 tokens against float64; the graph compiled for 8 serves 3000 as well."""
    from mhc_compile.config import Options
    from mhc_compile.lowering.base import LoweringLog
    from mhc_compile.lowering.inductor import config_patches

    log = LoweringLog()
    # A graph from the disk runs no pass of ours, and the count of the fusions is asked for.
    patches: Any = config_patches(Options(), log) | {"triton.cudagraphs": mode == "cudagraphs", "fx_graph_cache": False}
    function = functools.partial(interpreted_few_tokens.chain, variant=variant)
    compiled = torch.compile(function, fullgraph=True, options=patches)
    for width in (384, 2560):
        torch._dynamo.reset()
        for tokens in (1, 8, 64, 3000):
            x, w, sites = interpreted_few_tokens.chain_inputs(tokens, width, batch=1)
            x, w = x.to(torch.bfloat16), w.to(torch.bfloat16)
            sites = [(*site[:5], site[5].to(torch.bfloat16)) for site in sites]
            torch._dynamo.mark_dynamic(x, 1) if tokens > 1 else None
            exact = function(x.double(), w.double(), [tuple(t.double() for t in site) for site in sites])
            with torch.no_grad():
                for _ in range(3):  # the second call records a CUDA graph, the third replays it
                    torch.compiler.cudagraph_mark_step_begin()
                    got = compiled(x, w, sites)
                assert float((exact - got).norm()) <= 0.02 * float(exact.norm()), (width, tokens)
    assert log.counts()["few tokens", "fused"] == 2 * 2 * 3, "widths, one token and a symbol, sites"


def large(value: Any, few: int, times: int, made: dict[int, Any]) -> Any:
    """`times` copies behind one another along the dimension of `few` tokens; what was `made` of a tensor is kept."""
    if not isinstance(value, torch.Tensor) or few not in value.shape[:2]:
        return value
    if id(value) not in made:
        along = value.shape.index(few)
        made[id(value)] = value.repeat(*(times if dim == along else 1 for dim in range(value.dim())))
    return made[id(value)]


STATES = (
    "post", "post_dots", "pre", "pre_dots", "pre_norm", "pre_norm_dots", "post_pre_norm", "project", "post_project",
    "activate_pre_norm", "streams_backward", "replay", "replay_normed",
)  # fmt: skip
"""Every kernel that reads or writes the streams, but for `site_boundary`."""


@pytest.mark.parametrize(("n", "names"), [(8, STATES), (4, ("site_boundary",))])
def test_more_than_2_31_elements(n: int, names: tuple[str, ...]) -> None:
    """The same 64 tokens over and over: the last have the bits of the first. At most 30 GB, one after another."""
    from tests.lowering.calls import calls

    few, width = 64, 4096
    times = 2**31 // (few * n * width) + 1
    every = calls(few, width, n)
    for name in names:
        made: dict[int, Any] = {}
        arguments = tree_map(functools.partial(large, few=few, times=times, made=made), every[name][0])
        results = getattr(torch.ops.mhc_kernel, name)(*arguments)
        assert max(value.numel() for value in made.values()) > 2**31, name
        for result in (results,) if isinstance(results, torch.Tensor) else results:
            along = next((dim for dim, size in enumerate(result.shape) if size and size % times == 0), None)
            if along is None:  # a result that nobody asked for
                assert result.numel() == 0
                continue
            size = result.shape[along] // times
            first, last = result.narrow(along, 0, size), result.narrow(along, result.shape[along] - size, size)
            assert torch.isfinite(first).all(), name
            assert torch.equal(first, last), name
        del arguments, results, result, first, last
        torch.cuda.empty_cache()
