"""The Sinkhorn pattern: random chains from the table of spellings, and each way to be almost one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mhc_compile.patterns import sinkhorn
from mhc_compile.patterns.base import Candidate, Refused
from tests.spellings.harness import Raised, capture, raised

Step = Callable[[Tensor, int], Tensor]


@dataclasses.dataclass(frozen=True)
class Chain:
    """One point of the table: positions of the matrix axes among four, order, eps, count, spellings, plumbing."""

    rows: int
    columns: int
    positivity: str
    positive_eps: float
    first: str
    eps: float
    mode: str
    spellings: tuple[int, ...]
    plumbing: tuple[int, ...]
    size: int
    casts: str = "none"
    """none: float64 all through; wider: float32 around float64; narrow: bfloat16 around float32, as in a bf16 model."""
    perturbed: str = ""
    where: int = 0


def _divide(m: Tensor, total: Tensor, spelling: int) -> Tensor:
    if spelling == 0:
        return m / total
    if spelling == 1:
        return torch.div(m, total)
    if spelling == 2:
        return m * (1.0 / total)
    return torch.mul(total.reciprocal(), m)


def _step(m: Tensor, dim: int, chain: Chain, eps: float, spelling: int) -> Tensor:
    if chain.positivity == "log":
        return F.log_softmax(m, dim) if spelling % 2 else m - m.logsumexp(dim, keepdim=True)
    if spelling == 4 and chain.mode == "clamp" and eps:
        return F.normalize(m, p=1, dim=dim, eps=eps)
    total = m.sum(dim, keepdim=True) if spelling % 2 else torch.sum(m, dim=dim).unsqueeze(dim)
    if eps:
        total = total + eps if chain.mode == "add" else total.clamp(min=eps)
    return _divide(m, total, spelling % 4)


def _dead(m: Tensor, kind: int) -> Tensor:
    """Operations that change nothing."""
    if kind == 1:
        return m.transpose(0, 1).contiguous().transpose(1, 0)
    if kind == 2:
        return m.reshape(m.shape[0], -1).view(m.shape)
    return m.to(m.dtype).clone() if kind == 3 else m


def _start(x: Tensor, chain: Chain) -> Tensor:
    match chain.positivity:
        case "softmax":
            m = x.softmax(chain.rows)
        case "exp_rowmax":
            m = torch.exp(x - x.amax(chain.rows, keepdim=True))
        case "exp":
            m = torch.exp(x)
        case "abs":
            m = torch.abs(x)
        case _:
            return x
    return m + chain.positive_eps if chain.positive_eps else m


OUTSIDE = {"none": torch.float64, "wider": torch.float32, "narrow": torch.bfloat16}
WITHIN: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "wider": lambda x: x.double(),
    "narrow": lambda x: x.to(torch.float32),
}
ROUNDING = {"none": 1e-9, "wider": 1e-6, "narrow": 2e-2}
"""One rounding on the way out may fall to the other side."""


def build(chain: Chain) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The function that a chain stands for, with its perturbation."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        m, extra = _start(WITHIN[chain.casts](x * 1.0), chain), []
        for index, (spelling, plumbing) in enumerate(zip(chain.spellings, chain.plumbing, strict=True)):
            here = index == chain.where
            if here and chain.perturbed == "missing":
                continue
            even = index % 2 == 0
            dim = chain.rows if even == (chain.first == "row") else chain.columns
            eps = chain.eps * 3 + 1e-3 if here and chain.perturbed == "eps" else chain.eps
            m = _dead(_step(m, dim, chain, eps, spelling), plumbing)
            if here and chain.perturbed == "read":
                extra.append(m.amax())
            if here and chain.perturbed == "rounded":
                m = m.to(torch.float16).to(m.dtype)
            if here and chain.perturbed == "scaled":
                m = m * 1.01
        return ((m.exp() if chain.positivity == "log" else m).to(x.dtype), *extra)

    return function


@st.composite
def chains(draw: st.DrawFn, perturbed: bool = False) -> Chain:
    """A chain from the table; ``perturbed`` ones differ from one in a single place in the middle."""
    rows, columns = draw(st.permutations(range(4)))[:2]
    positivity = draw(st.sampled_from(["softmax", "exp", "exp_rowmax", "abs", "log"]))
    log = positivity == "log"
    count = draw(st.integers(4 if perturbed else 2, 7))
    kinds = ["missing", "read", "scaled", "rounded"] + ([] if log else ["eps"])
    return Chain(
        rows=rows,
        columns=columns,
        positivity=positivity,
        positive_eps=0.0 if log else draw(st.sampled_from([0.0, 1e-6, 1e-2])),
        first=draw(st.sampled_from(["row", "column"])),
        eps=0.0 if log else draw(st.sampled_from([0.0, 1e-8, 1e-6, 1e-2])),
        mode=draw(st.sampled_from(["add", "clamp"])),
        spellings=tuple(draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))),
        plumbing=tuple(draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))),
        size=draw(st.sampled_from([2, 3, 4])),
        casts=draw(st.sampled_from(list(OUTSIDE))),
        perturbed=draw(st.sampled_from(kinds)) if perturbed else "",
        where=draw(st.integers(1, count - 3)) if perturbed else 0,
    )


def raise_chain(chain: Chain) -> Raised:
    sizes = [5, 3, 7, 6]
    sizes[chain.rows] = sizes[chain.columns] = chain.size
    logits = torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    return raised(build(chain), logits.to(OUTSIDE[chain.casts]))


FEW = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


@FEW
@given(chains())
def test_a_random_chain_is_raised_with_its_attributes_and_numbers(chain: Chain) -> None:
    got = raise_chain(chain)
    assert got.reasons == []
    assert got.ops == {"sinkhorn": 1}
    (attributes,) = got.attributes("sinkhorn")
    assert attributes["positivity"] == chain.positivity
    assert attributes["positive_eps"] == chain.positive_eps
    assert attributes["steps"] == len(chain.spellings)
    assert attributes["eps"] == chain.eps
    if chain.positivity in ("softmax", "exp_rowmax"):  # elsewhere nothing says which axis is called a row
        assert attributes["first"] == chain.first
    got.assert_same(ROUNDING[chain.casts])


@FEW
@given(chains(perturbed=True))
def test_a_perturbed_chain_is_refused(chain: Chain) -> None:
    got = raise_chain(chain)
    # What comes before the disturbance may be a chain of its own; no op reaches across it.
    assert all(attributes["steps"] <= chain.where + 1 for attributes in got.attributes("sinkhorn"))
    assert got.reasons
    assert all(reason.startswith("sinkhorn: ") for reason in got.reasons)
    got.assert_same(ROUNDING[chain.casts])


def only(function: Callable[[Tensor], Tensor], logits: Tensor) -> Candidate | Refused | None:
    graph, _ = capture(function, logits)
    found = list(sinkhorn.find(graph.graph))
    assert len(found) <= 1
    return found[0] if found else None


def misaligned(x: Tensor) -> Tensor:
    """sum over the rows without keepdim, broadcast over the columns: runs only because the matrix is square."""
    m = torch.exp(x)
    m = m / m.sum(-1)
    return m / m.sum(-2, keepdim=True)


def both_axes(x: Tensor) -> Tensor:
    m = torch.exp(x)
    m = m / m.sum((-1, -2), keepdim=True)
    return m / m.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (misaligned, "a step divides by sums along a different axis than it broadcasts over"),
        (both_axes, "a step normalises 2 axes at once instead of one"),
    ],
)
def test_a_step_along_the_wrong_axis_is_refused(function: Callable[[Tensor], Tensor], reason: str) -> None:
    found = only(function, torch.randn(4, 4, requires_grad=True))
    assert isinstance(found, Refused)
    assert found.reason == reason


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.softmax(-1),
        lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
        lambda x: x.softmax(-1) / x.softmax(-1).sum(-1, keepdim=True),
        lambda x: x / x.sum(-1, keepdim=True),
        lambda x: x.log_softmax(-1).exp(),
    ],
)
def test_an_ordinary_normalisation_is_no_candidate(function: Callable[[Tensor], Tensor]) -> None:
    assert only(function, torch.rand(2, 4, 4)) is None


def test_thirty_nine_steps_are_not_forty() -> None:
    """After convergence the numbers cannot tell them apart; the graph can."""

    def v4(x: Tensor) -> Tensor:
        m = x.softmax(-1) + 1e-6
        m = m / (m.sum(-2, keepdim=True) + 1e-6)
        for _ in range(19):
            m = m / (m.sum(-1, keepdim=True) + 1e-6)
            m = m / (m.sum(-2, keepdim=True) + 1e-6)
        return m

    got = raised(v4, torch.randn(5, 4, 4, dtype=torch.float64))
    (attributes,) = got.attributes("sinkhorn")
    assert (attributes["first"], attributes["steps"]) == ("column", 39)
    got.assert_same()


def test_any_number_of_tokens() -> None:
    def chain(x: Tensor) -> Tensor:
        m = x.unflatten(-1, (4, 4)).exp()
        for _ in range(2):
            m = m / m.sum(-1, keepdim=True)
            m = m / m.sum(-2, keepdim=True)
        return m

    got = raised(chain, torch.randn(5, 7, 16, dtype=torch.float64), dynamic=True)
    assert got.ops == {"sinkhorn": 1}
    got.assert_same()
