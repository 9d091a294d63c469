"""Kernels against the native bodies in float64, under Triton's interpreter. Run by test_interpreter.py in a process
of its own: TRITON_INTERPRET is read when Triton is imported. Uninitialised memory is filled with NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile import ops
from mhc_compile.lowering import (
    boundary,
    coefficients,
    launch,
    post,
    post_pre_norm,
    pre,
    pre_norm,
    replay,
    replay_normed,
    sinkhorn,
    site_boundary,
)
from mhc_compile.ops import CoefficientSpec, SinkhornSpec

CASES = [
    (4, 50, torch.bfloat16, (2, 2)),
    (4, 64, torch.bfloat16, (3,)),
    (3, 33, torch.float32, (7,)),
    (2, 16, torch.float16, (5,)),
    (8, 40, torch.bfloat16, (3,)),
    (1, 24, torch.bfloat16, (1,)),
    (4, 50, torch.bfloat16, (0,)),
    (4, 50, torch.bfloat16, (1,)),
    (4, 40, torch.float16, (3,)),
]
pytestmark = pytest.mark.usefixtures("poisoned")
RMS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 6e-3}


def double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(got: Any, want: Any, bound: float) -> None:
    got = (got,) if isinstance(got, Tensor) else got
    want = (want,) if isinstance(want, Tensor) else want
    assert len(got) == len(want)
    for index, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.shape == b.shape, index
        error = float((a.double() - b.double()).norm() / (b.double().norm() + 1e-12))
        assert error <= bound, (index, error)


def test_the_interpreter_is_on() -> None:
    assert launch.INTERPRETED


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("positivity", ["softmax", "exp", "exp_rowmax", "log", "abs"])
def test_sinkhorn(n: int, positivity: str) -> None:
    every = [("row", 5, (1e-3, "add")), ("column", 4, (0.3, "clamp")), ("row", 0, (1e-3, "add"))]
    for first, steps, (eps, mode) in every if n == 4 else [("column", 4, (1e-3, "add"))]:
        log = positivity == "log"
        spec = SinkhornSpec(positivity, 0.0 if log else 1e-3, first, steps, 0.0 if log else eps, mode)
        x, g = torch.randn(11, n, n), torch.randn(11, n, n)
        flat = spec.op_arguments()
        check(sinkhorn.forward(x, **flat), sinkhorn_native(x, spec), 2e-6)
        want = ops.sinkhorn.native_backward(g.double(), x.double(), **flat)
        if n > 1:
            check(sinkhorn.backward(g, x, **flat), want, 3e-5)


def sinkhorn_native(x: Tensor, spec: SinkhornSpec) -> Tensor:
    return ops.sinkhorn.native(x.double(), **spec.op_arguments())


@pytest.mark.parametrize("lead", [(0,), (1,), ()])
def test_sinkhorn_of_no_and_one_token(lead: tuple[int, ...]) -> None:
    arguments = SinkhornSpec(steps=4).op_arguments()
    x, g = torch.randn(*lead, 4, 4), torch.randn(*lead, 4, 4)
    check(sinkhorn.forward(x, **arguments), ops.sinkhorn.native(x.double(), **arguments), 2e-6)
    want = ops.sinkhorn.native_backward(g.double(), x.double(), **arguments)
    check(sinkhorn.backward(g, x, **arguments), want, 3e-5)


def test_sinkhorn_forty_steps() -> None:
    spec = SinkhornSpec()
    x, g = torch.randn(3, 4, 4) * 3, torch.randn(3, 4, 4)
    check(sinkhorn.forward(x, **spec.op_arguments()), sinkhorn_native(x, spec), 5e-6)
    want = ops.sinkhorn.native_backward(g.double(), x.double(), **spec.op_arguments())
    check(sinkhorn.backward(g, x, **spec.op_arguments()), want, 2e-4)


def test_sinkhorn_of_a_wide_exp() -> None:
    """A column of exp(-80) against exp(80): its sum becomes a denormal, and the quotient is finite all the same."""
    spec = SinkhornSpec("exp", 1e-6, "column", 40)
    x = torch.tensor([[80.0] * 4, [-80.0] * 4, [1.0, 2.0, 3.0, 4.0], [-3.0, 80.0, -80.0, 0.0]]).view(1, 4, 4)
    check(sinkhorn.forward(x, **spec.op_arguments()), sinkhorn_native(x, spec), 1e-5)


@pytest.mark.parametrize(("n", "width", "dtype", "lead"), CASES)
@pytest.mark.parametrize("transpose", [False, True])
def test_post(n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...], transpose: bool) -> None:
    x, y, g = (torch.randn(*lead, *tail).to(dtype) for tail in ((n, width), (width,), (n, width)))
    q, h = torch.randn(*lead, n), torch.randn(*lead, n, n)
    for res in (h, None):
        args = (x, y, q, res)
        check(post.forward(*args, transpose), ops.post.native(*map(double, args), transpose), RMS[dtype])
        needs = [True, True, True, res is not None]
        want = ops.post.native_backward(*map(double, (g, *args)), transpose, needs)
        check(post.backward(g, *args, transpose, needs), want, RMS[dtype])


@pytest.mark.parametrize(("n", "width", "dtype", "lead"), CASES)
def test_pre(n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    x, du, p = torch.randn(*lead, n, width).to(dtype), torch.randn(*lead, width).to(dtype), torch.randn(*lead, n)
    check(pre.forward(x, p), ops.pre.native(double(x), double(p)), RMS[dtype])
    want = ops.pre.native_backward(double(du), double(x), double(p), [True, True])
    check(pre.backward(du, x, p, [True, True]), want, RMS[dtype])


NORMS = {
    "llama": ("rms", 0.0, True, True, False),
    "gemma": ("rms", 1.0, False, True, False),
    "plain": ("rms", 0.0, False, False, False),
    "layer": ("layer", 0.0, False, True, True),
}
"""Name -> kind, offset, round_first, has a weight, has a bias."""


@pytest.mark.parametrize(
    ("which", "n", "width", "dtype", "lead"),
    [
        *(("llama", *case) for case in [*CASES, (4, 300, torch.bfloat16, (19,))]),
        *((which, *case) for which in ("gemma", "plain", "layer") for case in (CASES[0], CASES[2])),
    ],
)
def test_pre_norm(which: str, n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    kind, offset, round_first, weighted, biased = NORMS[which]
    x, p, g = torch.randn(*lead, n, width).to(dtype), torch.randn(*lead, n), torch.randn(*lead, width).to(dtype)
    weight = (torch.randn(width) * 0.3 + 1 - offset).to(dtype) if weighted else None
    bias = torch.randn(width).to(dtype) if biased else None
    attributes = (kind, 1e-5, offset, round_first)
    needs = [True, True, weighted, biased]
    firsts = []
    for keep in (False, True):
        out, statistics, mixed = pre_norm.forward(x, p, weight, bias, *attributes, keep)
        want = ops.pre_norm.native(double(x), double(p), double(weight), double(bias), *attributes, keep)
        check(out, want[0], 2 * RMS[dtype])  # u, z and the result are rounded one after the other
        check((statistics, mixed), want[1:], RMS[dtype])
        firsts.append((out, statistics))
        kept = mixed if keep else None
        got = pre_norm.backward(g, x, p, weight, bias, statistics, kept, *attributes, needs)
        tensors = tuple(map(double, (g, x, p, weight, bias, want[1], want[2] if keep else None)))
        want = ops.pre_norm.native_backward(*tensors, *attributes, needs)
        if n == 1:  # a norm forgets the scale of its input: dh_pre is what rounding leaves of zero
            assert float(got[1].abs().max()) <= RMS[dtype] * float(x.double().norm() * g.double().norm())
            got, want = (got[0], *got[2:]), (want[0], *want[2:])
        check(got, want, 2 * RMS[dtype])
    assert all(torch.equal(one, other) for one, other in zip(*firsts, strict=True))


@pytest.mark.parametrize(
    ("n", "width", "dtype", "lead"), [CASES[0], CASES[2], *CASES[6:], (4, 300, torch.bfloat16, (5,))]
)
@pytest.mark.parametrize("which", ["llama", "layer"])
def test_post_pre_norm(which: str, n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """One call gives what post and then pre_norm give, bit for bit."""
    kind, offset, round_first, _, biased = NORMS[which]
    x, y, p = torch.randn(*lead, n, width).to(dtype), torch.randn(*lead, width).to(dtype), torch.randn(*lead, n)
    q, h = torch.randn(*lead, n), torch.randn(*lead, n, n)
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype) if biased else None
    for mix, transpose in ((h, False), (h, True), (None, False)):
        norm = (weight, bias, kind, 1e-5, offset, round_first)
        for keep in (False, True):
            state, *rest = post_pre_norm.forward(x, y, q, mix, transpose, p, *norm, keep)
            alone = post.forward(x, y, q, mix, transpose)
            assert torch.equal(state, alone)
            check(rest, pre_norm.forward(alone, p, *norm, keep), 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(("n", "width", "dtype", "lead"), [CASES[0], CASES[2], *CASES[6:]])
@pytest.mark.parametrize("count", [1, 4])
def test_replay(count: int, n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """A block of sites in one call: the same bits as post after post."""
    x = torch.randn(*lead, n, width).to(dtype)
    ys = [torch.randn(*lead, width).to(dtype) for _ in range(count)]
    posts = [torch.randn(*lead, n) for _ in range(count)]
    mixes = [torch.randn(*lead, n, n) / n for _ in range(count)]
    for given, transpose in ((mixes, False), (mixes, True), ([], False)):
        state = x
        for index, got in enumerate(replay.forward(x, ys, posts, given, transpose)):
            state = post.forward(state, ys[index], posts[index], given[index] if given else None, transpose)
            assert torch.equal(got, state)


def replayed(
    x: Tensor, sites: list[dict[str, Any]], transpose: bool, norm: tuple[Any, ...], keep: bool, written: list[bool]
) -> list[Tensor]:
    """`replay_normed` of sites {y, q, h or None, p, weight, bias}, those without a gate without a norm."""
    normed = [site["p"] is not None for site in sites]

    def given(name: str, of: list[dict[str, Any]]) -> list[Tensor]:
        return [site[name] for site in of if site[name] is not None]

    branches = [site for site in sites if site["p"] is not None]
    return replay_normed.forward(
        x, given("y", sites), given("q", sites), given("h", sites), transpose, normed, written, given("p", branches),
        given("weight", branches), given("bias", branches), *norm, keep,
    )  # fmt: skip


def site_after_site(
    x: Tensor, sites: list[dict[str, Any]], transpose: bool, norm: tuple[Any, ...], keep: bool, native: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """The same by a kernel a site, or by the native bodies in float64: (states, results of the norms)."""
    state, states, results = double(x) if native else x, [], []
    for site in sites:
        y, q, h, p, weight, bias = (double(value) if native else value for value in site.values())
        if native:
            state = ops.post.native(state, y, q, h, transpose)
            if p is not None:
                results += ops.pre_norm.native(state, p, weight, bias, *norm, keep)
        elif p is None:
            state = post.forward(state, y, q, h, transpose)
        else:
            state, *found = post_pre_norm.forward(state, y, q, h, transpose, p, weight, bias, *norm, keep)
            results += found
        states.append(state)
    return states, results


@pytest.mark.parametrize(
    ("which", "n", "width", "dtype", "lead"),
    [
        *(("llama", *case) for case in [CASES[0], *CASES[2:4], *CASES[6:], (4, 300, torch.bfloat16, (2,))]),
        *(("layer", *case) for case in (CASES[0], CASES[2])),
        *((which, *CASES[0]) for which in ("gemma", "plain")),
    ],
)
def test_replay_normed(which: str, n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    """A block of sites with their branch inputs in one call: the bits of a kernel a site; against float64 as well."""
    kind, offset, round_first, weighted, biased = NORMS[which]
    norm, x = (kind, 1e-5, offset, round_first), torch.randn(*lead, n, width).to(dtype)
    sites = [
        {
            "y": torch.randn(*lead, width).to(dtype),
            "q": torch.randn(*lead, n),
            "h": torch.randn(*lead, n, n) / n,
            "p": torch.randn(*lead, n),
            "weight": (torch.randn(width) * 0.3 + 1 - offset).to(dtype) if weighted else None,
            "bias": torch.randn(width).to(dtype) if biased else None,
        }
        for _ in range(replay.MOST)
    ]
    alone = [dict(site, p=None) for site in sites]
    without = [dict(site, h=None) for site in sites]
    mixtures = [
        (sites, False, False), (sites, True, True), (without[:2], False, True), (sites[:1], False, False),
        ([alone[0], sites[1], alone[2], sites[3]], False, False), ([*sites[:2], alone[2]], True, True),
    ]  # fmt: skip
    for some, transpose, keep in mixtures:
        count = len(some)
        states, results = site_after_site(x, some, transpose, norm, keep)
        got = replayed(x, some, transpose, norm, keep, [True] * count)
        assert len(got) == count + len(results)
        assert all(torch.equal(one, other) for one, other in zip(got, states + results, strict=True))
        exact, more = site_after_site(x, some, transpose, norm, keep, native=True)
        check(got, exact + more, 6 * RMS[dtype])
        written = [index % 2 == 1 for index in range(count)]
        got = replayed(x, some, transpose, norm, keep, written)
        for index, state in enumerate(states):
            assert torch.equal(got[index], state) if written[index] else got[index].numel() == 0
        assert all(torch.equal(one, other) for one, other in zip(got[count:], results, strict=True))


def test_pre_norm_of_a_gradient_in_parts() -> None:
    x, p, parts = torch.randn(2, 3, 4, 32), torch.randn(2, 3, 4), [torch.randn(6, 32) for _ in range(3)]
    _, statistics, _ = pre_norm.forward(x, p, None, None, "rms", 1e-5, 0.0, False)
    rest = (x, p, None, statistics, "rms", 0.0, False, True, False, False)
    for count in (2, 3):
        whole = pre_norm.dots(sum(parts[:count]), *rest)
        check(pre_norm.dots(parts[0], *rest, *parts[1:count])[:2], whole[:2], 1e-6)
    kept = pre_norm.forward(x, p, None, None, "rms", 1e-5, 0.0, False, True)[2]
    check(pre_norm.dots(parts[0], *rest, mixed=kept)[:2], pre_norm.dots(parts[0], *rest)[:2], 1e-6)


def test_pre_norm_without_what_nobody_needs() -> None:
    x, p, g = torch.randn(3, 4, 32), torch.randn(3, 4), torch.randn(3, 32)
    _, statistics, _ = pre_norm.forward(x, p, None, None, "rms", 1e-5, 0.0, False)
    got = pre_norm.backward(g, x, p, None, None, statistics, None, "rms", 1e-5, 0.0, False, [True, False, False, False])
    assert [value.numel() for value in got] == [x.numel(), 0, 0, 0]


SPECS = {
    "default": {"sinkhorn": SinkhornSpec(steps=4)},
    "outside": {"layout": "pre,res,post", "norm": "rms_outside", "norm_eps": 1e-3, "res": "linear", "sinkhorn": None},
    "pre only": {"layout": "pre", "norm": "none", "res": "none", "sinkhorn": None},
    "linear gate": {"gate": "linear", "sinkhorn": SinkhornSpec(steps=3), "mix_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(("n", "width", "dtype", "lead"), [CASES[0], *CASES[2:5], *CASES[6:]])
@pytest.mark.parametrize("which", list(SPECS))
def test_coefficients(which: str, n: int, width: int, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    spec = CoefficientSpec(streams=n, **SPECS[which])
    x, phi, bias = (
        torch.randn(*lead, n, width).to(dtype),
        torch.randn(spec.rows, n * width) * 0.2,
        torch.randn(spec.rows),
    )
    args = (x, phi, bias, torch.tensor(0.7), torch.tensor([0.9]), torch.tensor(0.5))
    flat = list(spec.op_arguments().values())
    got, want = coefficients.forward(*args, *flat), ops.coefficients.native(*map(double, args), *flat)
    check(got, want, 1e-2 if spec.mix_dtype else 2e-5)
    grads = [torch.randn(value.shape) if value.numel() else None for value in got[:3]]
    if not x.numel():
        grads = [None if value.shape[-1] == 0 else torch.randn(value.shape) for value in got[:3]]
    needs = [True] * 6
    actual = boundary.coefficients_backward(*grads, *args, got[3], needs, *flat)
    exact = ops.coefficients.native_backward(*map(double, grads), *map(double, args), want[3], needs, *flat)
    check(actual[:1], exact[:1], 3e-3 if dtype == torch.float16 else RMS[dtype])  # phi is one bf16 copy there
    check(actual[1:], exact[1:], 2e-3)


def test_few_tokens_split_the_channels() -> None:
    """Decode: the projection is split over the channels and summed by who reads it."""
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=2))
    assert coefficients.project_splits(2, 32, 4 * 2048, 2) > 1
    x, phi = torch.randn(2, 4, 2048).bfloat16(), torch.randn(24, 4 * 2048) * 0.02
    args = (x, phi, torch.randn(24), *(torch.tensor(0.5) for _ in range(3)))
    flat = list(spec.op_arguments().values())
    check(coefficients.forward(*args, *flat), ops.coefficients.native(*map(double, args), *flat), 1e-4)


@pytest.mark.parametrize("fine", [False, True])
@pytest.mark.parametrize("width", [70, 288])
def test_stream_gradient_in_one_pass(width: int, fine: bool) -> None:
    """All terms at once equal the sum of the terms, in fewer roundings; `fine`: phi with what its rounding leaves."""
    n, tokens = 4, 21
    spec = CoefficientSpec()
    x, g = torch.randn(tokens, n, width).bfloat16(), torch.randn(tokens, n, width).bfloat16()
    du, p, h = torch.randn(tokens, width).bfloat16(), torch.randn(tokens, n), torch.randn(tokens, n, n)
    phi, multiple = torch.randn(spec.rows, n * width), torch.randn(tokens)
    dm = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    dm[:, : spec.rows] = torch.randn(tokens, spec.rows).bfloat16()
    dealt = boundary.dealt_phi(phi, torch.bfloat16, n, fine)
    got = boundary.streams_backward(x, g, h, False, du, p, dm, dealt, multiple)
    want = torch.einsum("toi,toc->tic", h.double(), g.double()) + p.double()[..., None] * du.double()[:, None]
    want += (dm[:, : spec.rows].double() @ (phi if fine else phi.bfloat16()).double()).view(tokens, n, width)
    want += multiple.double()[:, None, None] * x.double()
    check(got, want, 6e-3)
    alone = boundary.streams_backward(x.float().half(), None, None, False, None, None, dm, dealt, 0 * multiple)
    want = (dm[:, : spec.rows].double() @ phi.double()).view(tokens, n, width)
    check(alone, want, 4e-4 if fine else 4e-3)


def test_non_contiguous_inputs() -> None:
    x = torch.randn(5, 32, 4).bfloat16().transpose(1, 2)
    p = torch.randn(4, 5).t()
    check(pre.forward(x, p), ops.pre.native(x.double(), p.double()), 6e-3)
    y = torch.randn(32, 5).bfloat16().t()
    check(post.forward(x, y, p, None, False), ops.post.native(x.double(), y.double(), p.double(), None), 6e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "tokens", "transpose", "mixed"),
    [(64, 40, False, True), (96, 33, True, True), (32, 5, False, False), (32, 1, False, True), (32, 0, False, True)],
)
def test_site_boundary(width: int, tokens: int, transpose: bool, mixed: bool, dtype: torch.dtype) -> None:
    """The stream gradient of a site and the dot products of the post before it, against their formulas."""
    n, rows = 4, 24 if mixed else 8
    grad, x = torch.randn(tokens, n, width).to(dtype), torch.randn(tokens, n, width).to(dtype)
    y, du = torch.randn(tokens, width).to(dtype), torch.randn(tokens, width).to(dtype)
    p, q, c = torch.randn(tokens, n), torch.randn(tokens, n), torch.randn(tokens)
    h, mix = (torch.randn(tokens, n, n), torch.randn(tokens, n, n)) if mixed else (None, None)
    phi, dm = torch.randn(rows, n * width), torch.randn(tokens, rows)
    padded = boundary.padded_width(rows)
    halves = torch.zeros(tokens, 2 * padded, dtype=dtype)
    halves[:, :rows] = dm.to(dtype)
    halves[:, padded : padded + rows] = (dm - dm.to(dtype).float()).to(dtype)
    fine = dtype == torch.float16
    args = (grad, h, du, p, halves, boundary.dealt_phi(phi, dtype, n, fine), c, x, y, q, mix, transpose)
    got, more = site_boundary.site_boundary(*args), site_boundary.site_boundary(*args, True)
    assert all(torch.equal(one, other) for one, other in zip(got[:2], more[:2], strict=True))
    g, x, y, du, p, q, c, dm = (value.double() for value in (grad, x, y, du, p, q, c, dm))
    eye = torch.eye(n, dtype=torch.float64).expand(tokens, n, n)
    to, back = (eye if m is None else m.double().mT if transpose else m.double() for m in (h, mix))
    state = back @ x + q[..., None] * y[:, None]
    projected = (dm @ (phi if fine else phi.to(dtype)).double()).view(tokens, n, width)
    dx = to.mT @ g + p[..., None] * du[:, None] + projected + c[:, None, None] * state
    d_mix = dx @ x.mT
    flat = (d_mix.mT if transpose else d_mix).flatten(1)
    sums = torch.cat([(dx * y[:, None]).sum(-1), flat], 1) if mixed else (dx * y[:, None]).sum(-1)
    check((got[0], got[1], got[2].sum(0)), (dx, (q[..., None] * dx).sum(1), sums), RMS[dtype])
    gate = (state * du[:, None]).sum(-1)
    check(more[2].sum(0), torch.cat((sums, gate), 1), RMS[dtype])
    check(more[2].sum(0)[:, -n:], gate, 1e-5)
