"""The chain of sites that ``site`` and ``decode`` measure: its parameters, DeepSeek-V4's semantics spelled out, errors.

A site is coefficients (softmax start, 20 rounds), pre, RMSNorm of the branch input, post; the branch is the identity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

EPS = 1e-6
STREAMS = 4
Site = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""phi [24, 4 C] fp32, bias [24] fp32, three alphas [1] fp32 (pre, post, res), weight of the norm [C] bf16."""
Chain = Callable[[Tensor, list[Site]], Tensor]
"""Streams [1, T, 4, C] bf16 and the sites -> streams."""
Parameters = Sequence[Tensor]
"""phi, bias and the three alphas of a site."""
Branch = Callable[[Tensor], Tensor]
"""Branch input [..., C] -> branch output [..., C]; its norm is a part of it."""
SiteFunction = Callable[[Tensor, Parameters, Branch], Tensor]
"""Streams [B, T, 4, C] bf16, the parameters of a site and its branch -> streams."""


def rms_norm(u: Tensor, weight: Tensor) -> Tensor:
    wide = u.float() if u.dtype != torch.float64 else u
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(u.dtype)


def spelled_coefficients(x: Tensor, site: Parameters) -> tuple[Tensor, Tensor, Tensor]:
    """The spelling of Hugging Face's DeepseekV4HyperConnection."""
    phi, bias, *alphas = site
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


def spelled_pre(x: Tensor, pre: Tensor) -> Tensor:
    """Streams [..., 4, C] and their weights [..., 4] -> the branch input [..., C]."""
    return (pre.unsqueeze(-1) * x).sum(-2).to(x.dtype)


def spelled_post(x: Tensor, y: Tensor, post: Tensor, comb: Tensor, transpose: bool) -> Tensor:
    """The branch output [..., C] is added to the mixed streams: stream o takes comb[o, i] of stream i, or, transposed,
    comb[i, o]."""
    mixed = torch.matmul((comb.mT if transpose else comb).to(x.dtype), x)
    return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + mixed


def spelled_site(x: Tensor, site: Parameters, branch: Branch, transpose: bool = True) -> Tensor:
    """One site, as Hugging Face's DeepseekV4DecoderLayer spells it."""
    pre, post, comb = spelled_coefficients(x, site)
    return spelled_post(x, branch(spelled_pre(x, pre)), post, comb, transpose)


def chained(one: SiteFunction, norm: Callable[[Tensor, Tensor], Tensor] = rms_norm) -> Chain:
    """The chain of one site after the other, the branch of each its norm and nothing else."""

    def run(x: Tensor, sites: list[Site]) -> Tensor:
        for *parameters, weight in sites:
            x = one(x, parameters, lambda u, weight=weight: norm(u, weight))
        return x

    return run


def spelled(x: Tensor, sites: list[Site]) -> Tensor:
    """Streams are mixed by ``comb`` (stream o takes comb[o, i] of stream i)."""
    return chained(functools.partial(spelled_site, transpose=False))(x, sites)


def spelled_transposed(x: Tensor, sites: list[Site]) -> Tensor:
    """Streams are mixed by the transpose of ``comb``, as DeepSeek's own code and TileKernels do it."""
    return chained(spelled_site)(x, sites)


def spelled_single_pass(x: Tensor, sites: list[Site]) -> Tensor:
    """V4.1: a site mixes its branch input by the weights that the site before it has computed, the first one takes
    stream 0. What the last site computes for the next one is not used, and its alpha has no gradient."""
    pre = torch.nn.functional.one_hot(torch.zeros(x.shape[:-2], dtype=torch.long, device=x.device), STREAMS)
    pre = pre.to(torch.promote_types(x.dtype, torch.float32))
    for *parameters, weight in sites:
        following, post, comb = spelled_coefficients(x, parameters)
        x = spelled_post(x, rms_norm(spelled_pre(x, pre), weight), post, comb, transpose=False)
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


def errors(function: Chain, reference: Chain, x: Tensor, sites: list[Site], checked: int = 64) -> dict[str, float]:
    """Relative RMS errors of output and gradients against float64.

    The chain runs on all tokens of ``x``, as when it is timed (one compilation serves both); the gradient of the output
    is random for ``checked`` tokens, spread evenly, and zero for all others, so that float64 has only those to compute.
    A gradient that is not zero for one of the others counts as an error. Gradients of parameters are taken together
    over the sites: a single alpha's may be nearly zero, and then anybody's relative error is large.
    """
    tokens = x.shape[1]
    index = torch.arange(min(checked, tokens), device=x.device) * (tokens // min(checked, tokens))
    generator = torch.Generator(device=x.device).manual_seed(1)
    part = torch.randn(1, len(index), *x.shape[2:], device=x.device, generator=generator).to(x.dtype)
    seed = torch.zeros_like(x)
    seed[:, index] = part

    out = function(x, sites)
    dx, *rest = torch.autograd.grad(out, leaves(x, sites), seed, materialize_grads=True)
    got = [out.detach()[:, index], dx[:, index], *rest]
    x_ = x.detach()[:, index].double().requires_grad_()
    sites_: list[Site] = [tuple(t.detach().double().requires_grad_() for t in site) for site in sites]  # type: ignore[misc]  # six tensors again
    exact = reference(x_, sites_)
    wanted = [exact.detach(), *torch.autograd.grad(exact, leaves(x_, sites_), part.double(), materialize_grads=True)]
    elsewhere = float(dx.index_fill(1, index, 0).float().norm() / wanted[1].norm())

    def error(got: list[Tensor], wanted: list[Tensor]) -> float:
        differences = torch.stack([(a.double() - b).norm() for a, b in zip(got, wanted, strict=True)])
        return float(differences.norm() / torch.stack([b.norm() for b in wanted]).norm())

    kinds = {"dphi": slice(2, None, 6), "dbias": slice(3, None, 6), "dweight": slice(7, None, 6)}
    found = {name: error(got[which], wanted[which]) for name, which in kinds.items()}
    alphas = [index for index in range(2, len(got)) if (index - 2) % 6 in (2, 3, 4)]
    found["dalpha"] = error([got[index] for index in alphas], [wanted[index] for index in alphas])
    return {"output": error(got[:1], wanted[:1]), "dx": error(got[1:2], wanted[1:2]) + elsewhere, **found}


def over_eager(own: dict[str, float], eager: dict[str, float]) -> dict[str, float]:
    """Each error over the one that the eager spelling makes of the same inputs: the bar is 1.5."""
    return {name: own[name] / eager[name] for name in own}
