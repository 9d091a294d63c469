"""The norm behind a pre: every spelling has one reading; a rounding that the op does not make is none of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mhc_compile import ops
from mhc_compile.patterns.pre_norm import BranchNorm, find
from tests.passes.graphs import is_parameter, traced

N, C, EPS = 4, 8, 1e-5
BF16, FP32 = torch.bfloat16, torch.float32
mix = torch.ops.mhc.pre.default


def read(function: Callable[..., Any], *parameters: torch.dtype, dtype: torch.dtype = BF16) -> BranchNorm | str:
    """What is found behind the pre of ``function(u, *parameters)``; the parameters are inputs w, w_1 ... [C]."""
    names = [f"w{index}" for index in range(len(parameters))]
    body: Any = eval(f"lambda x, h, {', '.join(names)}: f(mix(x, h), {', '.join(names)})", {"f": function, "mix": mix})
    examples = [torch.randn(3, N, C, dtype=dtype), torch.randn(3, N), *(torch.randn(C, dtype=p) for p in parameters)]
    gm = traced(body, *examples)
    (pre,) = [node for node in gm.graph.nodes if node.target is ops.pre.overload]
    return find(pre, is_parameter)


def summary(found: BranchNorm | str) -> tuple[Any, ...]:
    assert isinstance(found, BranchNorm), found
    names = [node.name if node is not None else None for node in (found.weight, found.bias)]
    return (found.kind, found.offset, found.round_first, *names)


def z(u: Tensor, eps: float = EPS) -> Tensor:
    x = u.to(FP32)
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def centred(u: Tensor) -> Tensor:
    x = u.float()
    mean = x.mean(-1, keepdim=True)
    return (x - mean) * torch.rsqrt((x - mean).pow(2).mean(-1, keepdim=True) + EPS)


RMS = ("rms", 0.0, False, "w0", None)
FIRST = ("rms", 0.0, True, "w0", None)
LAYER = ("layer", 0.0, False, "w0", None)


def spellings(kind: torch.dtype) -> dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...], tuple[Any, ...]]]:
    """Name -> (function of a branch input of dtype ``kind`` and parameters, their dtypes, what is found)."""
    return {
        "llama": (lambda u, w: w * z(u).to(kind), (kind,), FIRST),
        "llama, fp32 weight, cast back": (lambda u, w: (w * z(u).to(kind)).to(kind), (FP32,), FIRST),
        "llama4": (lambda u, w: z(u).type_as(u) * w, (kind,), FIRST),
        "t5": (
            lambda u, w: w * (u * torch.rsqrt(u.to(FP32).pow(2).mean(-1, keepdim=True) + EPS)).to(kind),
            (kind,),
            FIRST,
        ),
        "gemma": (lambda u, w: (z(u) * (1.0 + w.float())).type_as(u), (kind,), ("rms", 1.0, False, "w0", None)),
        "gemma4": (
            lambda u, w: (u.float() * torch.pow(u.float().pow(2).mean(-1, keepdim=True) + EPS, -0.5) * w.float()).to(
                kind
            ),
            (kind,),
            RMS,
        ),
        "olmo": (lambda u, w: (w * z(u)).to(kind), (kind,), RMS),
        "unweighted": (lambda u: z(u).to(kind), (), ("rms", 0.0, False, None, None)),
        "sqrt": (lambda u, w: (w * (u / torch.sqrt(EPS + (u.float() ** 2).mean(-1, True)))).to(kind), (FP32,), RMS),
        "1 / sqrt": (
            lambda u, w: (w * (u * (1 / (u.float().square().mean(-1, True) + EPS).sqrt()))).to(kind),
            (kind,),
            RMS,
        ),
        "x * x": (
            lambda u, w: (
                u.float() * torch.rsqrt((u.float() * u.float()).mean(dim=[-1], keepdim=True) + EPS) * w
            ).bfloat16(),
            (FP32,),
            RMS,
        ),
        "F.rms_norm": (lambda u, w: F.rms_norm(u, (C,), w, EPS), (kind,), RMS),
        "torch.rms_norm": (lambda u, w: torch.rms_norm(u, [C], weight=w, eps=EPS), (kind,), RMS),
        "F.rms_norm in fp32": (lambda u, w: F.rms_norm(u.float(), (C,), w, EPS).to(kind), (FP32,), RMS),
        "F.rms_norm, weight apart": (lambda u, w: F.rms_norm(u, (C,), None, EPS) * w, (kind,), FIRST),
        "F.layer_norm": (
            lambda u, w, b: F.layer_norm(u, (C,), w, b, EPS),
            (kind, kind),
            ("layer", 0.0, False, "w0", "w1"),
        ),
        "F.layer_norm, bias only": (
            lambda u, b: F.layer_norm(u, (C,), bias=b, eps=EPS),
            (kind,),
            ("layer", 0.0, False, None, "w0"),
        ),
        "torch.layer_norm": (lambda u, w: torch.layer_norm(u, (C,), w, None, EPS), (kind,), LAYER),
        "F.layer_norm in fp32": (
            lambda u: F.layer_norm(u.float(), (C,), None, None, EPS).to(kind),
            (),
            ("layer", 0.0, False, None, None),
        ),
        "F.layer_norm, 1 + w": (
            lambda u, w: F.layer_norm(u.float(), (C,), w.float() + 1.0, None, EPS).to(kind),
            (kind,),
            ("layer", 1.0, False, "w0", None),
        ),
        "cohere": (lambda u, w: (w.to(FP32) * centred(u)).to(kind), (kind,), LAYER),
        "variance in one call": (
            lambda u, w, b: (
                (u.float() - u.float().mean(-1, keepdim=True))
                * torch.rsqrt(u.float().var(-1, unbiased=False, keepdim=True) + EPS)
                * w
                + b
            ).to(kind),
            (FP32, kind),
            ("layer", 0.0, False, "w0", "w1"),
        ),
        "torch.var": (
            lambda u: (
                (u - torch.mean(u.float(), -1, True))
                / torch.sqrt(torch.var(u.float(), dim=-1, correction=0, keepdim=True) + EPS)
            ).to(kind),
            (),
            ("layer", 0.0, False, None, None),
        ),
        "views that are none": (lambda u, w: (w * z(u.contiguous()).to(kind)).reshape(3, C).clone(), (kind,), FIRST),
        "rounded, bias": (lambda u, b: z(u).to(kind) + b, (kind,), ("rms", 0.0, True, None, "w0")),
    }


SPELLINGS = spellings(BF16)


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    function, parameters, want = SPELLINGS[name]
    found = read(function, *parameters)
    assert summary(found) == want
    assert isinstance(found, BranchNorm)
    assert found.eps == EPS
    assert found.inside[-1] is found.out
    assert [user.op for user in found.out.users] == ["output"]


@pytest.mark.parametrize("name", SPELLINGS)
def test_in_float32_nothing_is_rounded(name: str) -> None:
    function, parameters, (kind, offset, _, weight, bias) = spellings(FP32)[name]
    assert summary(read(function, *parameters, dtype=FP32)) == (kind, offset, False, weight, bias)


NOT_READ: dict[str, tuple[Callable[..., Any], tuple[torch.dtype, ...], str]] = {
    "no norm": (lambda u, w: F.gelu(u) * w, (BF16,), "no norm that is known begins there .it is read by gelu"),
    "reduced in bf16": (
        lambda u, w: w * (u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + EPS)),
        (BF16,),
        "no norm that is known",
    ),
    "the inverse root is rounded": (
        lambda u, w: w * (u * torch.rsqrt(u.float().pow(2).mean(-1, keepdim=True) + EPS).to(BF16)),
        (BF16,),
        "no norm that is known",
    ),
    "eps outside of the root": (
        lambda u, w: (w * (u.float() / (torch.sqrt(u.float().pow(2).mean(-1, keepdim=True)) + EPS))).to(BF16),
        (FP32,),
        "no norm that is known",
    ),
    "eps twice": (
        lambda u, w: (w * (u * torch.rsqrt(u.float().pow(2).mean(-1, keepdim=True) + EPS + EPS))).to(BF16),
        (FP32,),
        "no norm that is known",
    ),
    "no eps given": (lambda u, w: F.rms_norm(u, (C,), w), (BF16,), "no norm that is known"),
    "over two axes": (lambda u: F.layer_norm(u, (3, C)), (), "no norm that is known"),
    "over the tokens": (
        lambda u: (u * torch.rsqrt(u.float().pow(2).mean(0, keepdim=True) + EPS)).to(BF16),
        (),
        "no norm that is known",
    ),
    "the unbiased variance": (
        lambda u: ((u - u.float().mean(-1, True)) * torch.rsqrt(u.float().var(-1, keepdim=True) + EPS)).to(BF16),
        (),
        "no norm that is known",
    ),
    "the result is wider": (
        lambda u, w: w * z(u).to(BF16),
        (FP32,),
        "the norm's result is float32, its input bfloat16",
    ),
    "the weight is rounded": (lambda u, w: F.layer_norm(u, (C,), w.to(BF16)), (FP32,), "no norm that is known"),
    "1 + w in bf16": (lambda u, w: F.rms_norm(u, (C,), 1.0 + w, EPS), (BF16,), "no norm that is known"),
    "read twice": (
        lambda u, w, v: F.rms_norm(u, (C,), w, EPS) @ F.rms_norm(u, (C,), v, EPS).T,
        (BF16, BF16),
        "it is read next to the norm as well .by rms_norm.",
    ),
    "read beside": (
        lambda u, w: F.linear(F.rms_norm(u, (C,), w, EPS), F.silu(u)),
        (BF16,),
        "it is read next to the norm as well .by silu.",
    ),
}


@pytest.mark.parametrize("name", NOT_READ)
def test_what_is_another_function(name: str) -> None:
    function, parameters, reason = NOT_READ[name]
    found = read(function, *parameters)
    assert isinstance(found, str)
    assert re.match(reason, found), found


def test_a_value_inside_that_others_read() -> None:
    def spelled(u: Tensor, w: Tensor) -> Any:
        x = u.to(FP32)
        variance = x.pow(2).mean(-1, keepdim=True)
        return (w * (x * torch.rsqrt(variance + EPS)).to(BF16)), variance

    assert read(spelled, BF16) == "a value inside of the norm is read elsewhere (by output)"


def test_what_can_be_folded_of_a_longer_chain() -> None:
    """Behind the rounded product another rounding follows: the norm ends in front of it."""
    found = read(lambda u, w, b: z(u).to(BF16) * w + b, BF16, BF16)
    assert summary(found) == FIRST
    assert isinstance(found, BranchNorm)
    assert [user.name for user in found.out.users] == ["add_1"]


def test_an_activation_is_no_weight() -> None:
    gm = traced(lambda x, h, gate: F.rms_norm(mix(x, h), (C,), gate, EPS), *_state(), torch.randn(C, dtype=BF16))
    assert find(_pre(gm), is_parameter) == "no norm that is known begins there (it is read by rms_norm)"


def test_dtype_of_the_stream() -> None:
    gm = traced(lambda x, h: F.rms_norm(mix(x, h), (C,), None, EPS), *(t.double() for t in _state()))
    assert find(_pre(gm), is_parameter) == "its dtype is float64"


def _state() -> tuple[Tensor, Tensor]:
    return torch.randn(3, N, C, dtype=BF16), torch.randn(3, N)


def _pre(gm: fx.GraphModule) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.target is ops.pre.overload)
