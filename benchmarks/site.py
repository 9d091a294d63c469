"""One site with its norm, forward and backward: python -m benchmarks.site [--width 4096 2560] [--sites 4].

A chain of sites (coefficients, pre, RMSNorm of the branch input, post; the branch itself is the identity) is timed
and divided
by their number, so that what fuses across a site boundary counts as it does in a model. Every implementation computes
DeepSeek-V4's semantics (softmax start, 20 rounds, bf16 streams) and is checked against float64 before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from benchmarks.device import median_us, unit_us
from benchmarks.record import RESULTS, record
from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import config_patches
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

EPS = 1e-6
STREAMS = 4
SPEC = CoefficientSpec(
    streams=STREAMS, norm_eps=EPS, pre_eps=EPS, sinkhorn=SinkhornSpec("softmax", EPS, "column", 39, EPS, "add")
)
Site = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def rms_norm(u: Tensor, weight: Tensor) -> Tensor:
    wide = u.float() if u.dtype != torch.float64 else u
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(u.dtype)


def spelled_coefficients(x: Tensor, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """The spelling of Hugging Face's DeepseekV4HyperConnection."""
    phi, bias, *alphas, _ = site
    n = STREAMS
    flat = x.flatten(-2)
    flat = flat if x.dtype == torch.float64 else flat.float()
    mix = torch.nn.functional.linear(flat, phi) * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    p, q, s = mix.split([n, n, n * n], dim=-1)
    pre = torch.sigmoid(p * alphas[0] + bias[:n]) + EPS
    post = 2 * torch.sigmoid(q * alphas[1] + bias[n : 2 * n])
    comb = torch.softmax((s * alphas[2] + bias[2 * n :]).unflatten(-1, (n, n)), dim=-1) + EPS
    comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    for _ in range(19):
        comb = comb / (comb.sum(-1, keepdim=True) + EPS)
        comb = comb / (comb.sum(-2, keepdim=True) + EPS)
    return pre, post, comb


def spelled(x: Tensor, sites: list[Site]) -> Tensor:
    for site in sites:
        pre, post, comb = spelled_coefficients(x, site)
        u = (pre.unsqueeze(-1) * x).sum(-2).to(x.dtype)
        y = rms_norm(u, site[5])
        x = post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.to(x.dtype), x)
    return x


def ours(x: Tensor, sites: list[Site]) -> Tensor:
    for phi, bias, a, b, c, weight in sites:
        pre, post, res, _ = torch.ops.mhc.coefficients.default(x, phi, bias, a, b, c, **SPEC.op_arguments())
        y, _ = torch.ops.mhc.pre_norm.default(x, pre, weight, None, "rms", EPS, 0.0, True)
        x = torch.ops.mhc.post.default(x, y, post, res, False)
    return x


def single_pass(x: Tensor, sites: list[Site]) -> Tensor:
    """V4.1: the pre-mix of a site comes from the coefficients of the site before it; one-hot at first."""
    pre = torch.nn.functional.one_hot(torch.zeros(x.shape[:-2], dtype=torch.long, device=x.device), STREAMS).float()
    for phi, bias, a, b, c, weight in sites:
        following, post, res, _ = torch.ops.mhc.coefficients.default(x, phi, bias, a, b, c, **SPEC.op_arguments())
        y, _ = torch.ops.mhc.pre_norm.default(x, pre, weight, None, "rms", EPS, 0.0, True)
        x = torch.ops.mhc.post.default(x, y, post, res, False)
        pre = following
    return x


def make_inputs(tokens: int, width: int, count: int, device: str = "cuda") -> tuple[Tensor, list[Site]]:
    generator = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * scale).requires_grad_()

    x = random(1, tokens, STREAMS, width).detach().to(torch.bfloat16).requires_grad_()
    sites: list[Site] = []
    for _ in range(count):
        weight = (random(width) * 0.1 + 1).detach().to(torch.bfloat16).requires_grad_()
        alphas = [torch.full((1,), 0.3, device=device).requires_grad_() for _ in range(3)]
        sites.append((random(24, STREAMS * width, scale=0.02), random(24), *alphas, weight))  # type: ignore[arg-type]  # six tensors
    return x, sites


def leaves(x: Tensor, sites: list[Site]) -> list[Tensor]:
    return [x, *(tensor for site in sites for tensor in site)]


def errors(function: Callable[..., Tensor], reference: Callable[..., Tensor], width: int) -> dict[str, float]:
    """Relative RMS error of output and gradients against float64, on 64 tokens."""
    x, sites = make_inputs(64, width, 2)
    seed = torch.randn(x.shape, device=x.device, generator=torch.Generator(device="cuda").manual_seed(1)).to(x.dtype)

    def run(f: Callable[..., Tensor], double: bool) -> list[Tensor]:
        def copy(t: Tensor) -> Tensor:
            return (t.detach().double() if double else t.detach().clone()).requires_grad_()

        x_, sites_ = copy(x), [tuple(copy(t) for t in site) for site in sites]
        out = f(x_, sites_)
        return [out, *torch.autograd.grad(out, leaves(x_, sites_), seed.to(out.dtype))]  # type: ignore[arg-type]  # as built

    exact, got = run(reference, True), run(function, False)
    ratios = [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, exact, strict=True)]
    return {"output": ratios[0], "dx": ratios[1], "dphi": ratios[2], "worst": max(ratios)}


def liger_chain() -> Callable[..., Tensor] | str:
    """Liger's mHC functions on the same chain, or why they are not measured."""
    try:
        from liger_kernel.transformers.functional import liger_mhc_coeffs, liger_mhc_post_res, liger_mhc_pre
    except ImportError as error:
        return f"not measured: {error}"

    def run(x: Tensor, sites: list[Site]) -> Tensor:
        for phi, bias, a, b, c, weight in sites:
            pre, post, res = liger_mhc_coeffs(
                x,
                phi.t(),
                bias,
                a.reshape(()),
                b.reshape(()),
                c.reshape(()),
                allow_fp32=False,
                tmax=20,
                rms_eps=EPS,
                pre_eps=EPS,
                sinkhorn_eps=EPS,
                post_mult=2.0,
            )
            y = rms_norm(liger_mhc_pre(x, pre), weight)
            x = liger_mhc_post_res(x, y, post, res)
        return x

    return run


def tile_kernels_chain() -> Callable[..., Tensor] | str:
    """TileKernels needs its own wheels; without them it is reported as not measured."""
    try:
        import tile_kernels  # noqa: F401
    except ImportError as error:
        return f"not measured: {error}"
    return "not measured: no chain is written for it"


def implementations(log: LoweringLog) -> dict[str, Callable[..., Tensor] | str]:
    patches: Any = config_patches(Options(), log)
    opaque: Any = config_patches(Options(), log, traced_launches=False)
    native: Any = config_patches(Options(lowering="native"), LoweringLog())
    return {
        "eager, spelled": spelled,
        "torch.compile, spelled": torch.compile(spelled, fullgraph=True),
        "Liger": liger_chain(),
        "TileKernels": tile_kernels_chain(),
        "mhc, native bodies through inductor": torch.compile(ours, fullgraph=True, options=native),
        "mhc, opaque launches": torch.compile(ours, fullgraph=True, options=opaque),
        "mhc": torch.compile(ours, fullgraph=True, options=patches),
        "mhc, single_pass": torch.compile(single_pass, fullgraph=True, options=patches),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--width", type=int, nargs="*", default=[4096, 2560])
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--only", nargs="*", default=None, help="names of rows; * stands for anything")
    parser.add_argument("--name", default="site", help="file under benchmarks/results")
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    log = LoweringLog()
    for width in arguments.width:
        u = unit_us(arguments.tokens, width)
        print(f"T {arguments.tokens}  C {width}  n {STREAMS}  u = {u:.2f} us", flush=True)
        for name, function in implementations(log).items():
            if arguments.only and not any(fnmatch(name, pattern) for pattern in arguments.only):
                continue
            key = f"{name}/{width}"
            if isinstance(function, str):
                results[key] = {"status": function}
                print(f"  {name:38s} {function}")
                continue
            torch._dynamo.reset()  # or a second width would be compiled for any width, which no kernel takes
            try:
                results[key] = measure(name, function, arguments.tokens, width, arguments.sites, u)
            except Exception as error:  # a peer that fails is a row of the table, not the end of it
                results[key] = {"status": f"failed: {type(error).__name__}: {str(error)[:300]}"}
                print(f"  {name:38s} {results[key]['status']}", flush=True)
            torch.cuda.empty_cache()
    print({f"{op}:{provider}": count for (op, provider), count in log.counts().items()})
    path = RESULTS / f"{arguments.name}.json"
    record("site", results, path, tokens=arguments.tokens, sites=arguments.sites)


def measure(
    name: str, function: Callable[..., Tensor], tokens: int, width: int, count: int, u: float
) -> dict[str, Any]:
    """Errors, then forward and forward + backward of a chain, a site."""
    reference = single_pass if "single_pass" in name else spelled
    error = errors(function, reference, width)
    x, sites = make_inputs(tokens, width, count)
    parameters = leaves(x, sites)
    seed = torch.randn_like(x)

    def step() -> None:
        torch.autograd.grad(function(x, sites), parameters, seed)

    forward = median_us(lambda: function(x, sites)) / count
    both = median_us(step) / count
    print(
        f"  {name:38s} fwd {forward / u:6.1f} u  fwd+bwd {both / u:6.1f} u  ({forward:.0f}, {both:.0f} us)  "
        f"errors {', '.join(f'{key} {value:.1e}' for key, value in error.items())}",
        flush=True,
    )
    return {"forward_us": forward, "both_us": both, "forward_u": forward / u, "both_u": both / u, "errors": error}


if __name__ == "__main__":
    main()
