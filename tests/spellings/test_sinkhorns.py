"""Every spelling of a Sinkhorn is raised with its own attributes; what is almost one is refused, with the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.spellings.harness import raised
from tests.spellings.site import Pieces, model, tokens

WHOLE = {"expand": 1, "coefficients": 2, "pre": 2, "post": 2, "collapse": 1}


def paper(s: Tensor) -> Tensor:
    m = s.exp()
    for _ in range(5):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def rows_first(s: Tensor) -> Tensor:
    m = torch.exp(s)
    for _ in range(3):
        m = torch.div(m, torch.sum(m, dim=-1, keepdim=True))
        m = torch.div(m, torch.sum(m, dim=-2, keepdim=True))
    return m


def log_space(s: Tensor) -> Tensor:
    for _ in range(3):
        s = s - s.logsumexp(-2, keepdim=True)
        s = s - torch.logsumexp(s, dim=-1, keepdim=True)
    return s.exp()


def log_softmax(s: Tensor) -> Tensor:
    for _ in range(2):
        s = F.log_softmax(s, dim=-1)
        s = torch.log_softmax(s, dim=-2)
    return torch.exp(s)


def row_max(s: Tensor) -> Tensor:
    m = torch.exp(s - s.amax(-1, keepdim=True))
    for _ in range(4):
        m = m / (m.sum(-1, keepdim=True) + 1e-8)
        m = m / (m.sum(-2, keepdim=True) + 1e-8)
    return m


def row_max_values(s: Tensor) -> Tensor:
    m = torch.exp(s - s.max(dim=-1, keepdim=True).values)
    for _ in range(2):
        m = m / m.sum(-2, keepdim=True)
        m = m / m.sum(-1, keepdim=True)
    return m


def row_max_detached(s: Tensor) -> Tensor:
    """The first step divides by the sums of the rows, so the maximum cancels, and its gradient with it."""
    m = torch.exp(s - s.amax(-1, keepdim=True).detach())
    for _ in range(2):
        m = m / m.sum(-1, keepdim=True)
        m = m / m.sum(-2, keepdim=True)
    return m


def absolute(s: Tensor) -> Tensor:
    m = s.abs() + 1e-4
    for _ in range(3):
        m = m / m.sum(dim=-1, keepdim=True)
        m = m / m.sum(dim=-2, keepdim=True)
    return m


def normalize(s: Tensor) -> Tensor:
    m = s.softmax(-1)
    for _ in range(3):
        m = F.normalize(m, p=1, dim=-2)
        m = F.normalize(m, p=1.0, dim=-1)
    return m


def reciprocal(s: Tensor) -> Tensor:
    m = torch.exp(s)
    for _ in range(2):
        m = m * (1.0 / (m.sum(-1, keepdim=True) + 1e-6))
        m = (m.sum(-2, keepdim=True) + 1e-6).reciprocal() * m
    return m


def clamped(s: Tensor) -> Tensor:
    m = torch.exp(s)
    for _ in range(2):
        m = m / m.sum(-1, keepdim=True).clamp(min=1e-3)
        m = m / torch.clamp_min(m.sum(-2, keepdim=True), 1e-3)
    return m


def einsum_sums(s: Tensor) -> Tensor:
    m = torch.exp(s)
    for _ in range(3):
        m = m / torch.einsum("...ij->...i", m).unsqueeze(-1)
        m = m / torch.einsum("bsij->bsj", m)[:, :, None]
    return m


def unsqueezed(s: Tensor) -> Tensor:
    m = torch.exp(s)
    for _ in range(3):
        m = m / m.sum(-1)[..., None]
        m = m / m.sum(2).unsqueeze(2).expand_as(m)
    return m


def transposing(s: Tensor) -> Tensor:
    """Always the last axis, of a matrix that is turned in between; dead reshapes and casts on the way."""
    m = torch.exp(s)
    for _ in range(2):
        m = m / m.sum(-1, keepdim=True)
        m = m.transpose(-1, -2).to(torch.float64)
        m = (m / m.sum(-1, keepdim=True)).mT.reshape(2, 3, 16).view(2, 3, 4, 4)
    return m


def in_place(s: Tensor) -> Tensor:
    """The second write does not even use the result of the call."""
    m = torch.softmax(s, -1) + 1e-6
    for _ in range(3):
        m /= m.sum(-2, keepdim=True)
        m.div_(m.sum(-1, keepdim=True))
    return m


EXPECTED: dict[Callable[[Tensor], Tensor], dict[str, Any]] = {
    paper: {"positivity": "exp", "first": "column", "steps": 10, "eps": 0.0},
    rows_first: {"positivity": "exp", "first": "row", "steps": 6},
    log_space: {"positivity": "log", "first": "column", "steps": 6},
    log_softmax: {"positivity": "log", "first": "row", "steps": 4},
    row_max: {"positivity": "exp_rowmax", "first": "row", "steps": 8, "eps": 1e-8, "eps_mode": "add"},
    row_max_values: {"positivity": "exp_rowmax", "first": "column", "steps": 4},
    row_max_detached: {"positivity": "exp_rowmax", "first": "row", "steps": 4},
    absolute: {"positivity": "abs", "positive_eps": 1e-4, "first": "row", "steps": 6},
    normalize: {"positivity": "softmax", "positive_eps": 0.0, "first": "column", "steps": 6, "eps_mode": "clamp"},
    reciprocal: {"positivity": "exp", "first": "row", "steps": 4, "eps": 1e-6},
    clamped: {"positivity": "exp", "eps": 1e-3, "eps_mode": "clamp", "steps": 4},
    einsum_sums: {"positivity": "exp", "first": "row", "steps": 6},
    unsqueezed: {"positivity": "exp", "first": "row", "steps": 6},
    transposing: {"positivity": "exp", "first": "row", "steps": 4},
    in_place: {"positivity": "softmax", "first": "column", "steps": 6},
}


@pytest.mark.parametrize("spelling", EXPECTED, ids=lambda f: f.__name__)
def test_a_spelling_is_raised_into_its_site_with_its_attributes(spelling: Callable[[Tensor], Tensor]) -> None:
    got = raised(model(Pieces(sinkhorn=spelling)), tokens())
    assert got.reasons == []
    assert got.ops == WHOLE
    for attributes in got.attributes("coefficients"):
        assert {k: attributes[f"sinkhorn_{k}"] for k in EXPECTED[spelling]} == EXPECTED[spelling]
    got.assert_same()


def missing_step(s: Tensor) -> Tensor:
    m = torch.exp(s)
    m = m / m.sum(-1, keepdim=True)
    m = m / m.sum(-2, keepdim=True)
    m = m / m.sum(-2, keepdim=True)
    return m / m.sum(-1, keepdim=True)


def other_eps(s: Tensor) -> Tensor:
    m = torch.exp(s)
    m = m / (m.sum(-1, keepdim=True) + 1e-6)
    m = m / (m.sum(-2, keepdim=True) + 1e-6)
    return m / (m.sum(-1, keepdim=True) + 1e-5)


def rounded(s: Tensor) -> Tensor:
    m = torch.exp(s)
    m = (m / m.sum(-1, keepdim=True)).to(torch.bfloat16)
    m = m / m.sum(-2, keepdim=True)
    return m.to(torch.float64)


def detached_column_first(s: Tensor) -> Tensor:
    m = torch.exp(s - s.amax(-1, keepdim=True).detach())
    m = m / m.sum(-2, keepdim=True)
    return m / m.sum(-1, keepdim=True)


def softplus(s: Tensor) -> Tensor:
    m = F.softplus(s)
    m = m / m.sum(-1, keepdim=True)
    return m / m.sum(-2, keepdim=True)


def watched(s: Tensor) -> Tensor:
    m = torch.exp(s)
    m = m / m.sum(-1, keepdim=True)
    middle = m
    m = m / m.sum(-2, keepdim=True)
    return m / m.sum(-1, keepdim=True) + 0.0 * middle.mean()


REFUSED: dict[Callable[[Tensor], Tensor], str] = {
    missing_step: "sinkhorn: steps 2 and 3 normalise the same axis",
    other_eps: "sinkhorn: step 3 has another eps",
    rounded: "sinkhorn: the matrix is rounded to torch.bfloat16 between two steps",
    detached_column_first: "sinkhorn: the gradients differ",
    softplus: "sinkhorn: the matrix comes from `softplus`",
    watched: "sinkhorn: an intermediate result is also read by",
}


@pytest.mark.parametrize("spelling", REFUSED, ids=lambda f: f.__name__)
def test_almost_a_sinkhorn_is_refused_and_the_mixing_is_raised(spelling: Callable[[Tensor], Tensor]) -> None:
    got = raised(model(Pieces(sinkhorn=spelling), sites=1), tokens())
    assert any(reason.startswith(REFUSED[spelling]) for reason in got.reasons), got.reasons
    assert got.ops.get("sinkhorn", 0) == 0
    assert (got.ops["pre"], got.ops["post"]) == (1, 1)
    assert all(attributes["layout"] != "pre,post,res" for attributes in got.attributes("coefficients"))
    got.assert_same()


def written_into_its_logits(s: Tensor) -> Tensor:
    m = s.exp_()
    m /= m.sum(-1, keepdim=True)
    m /= m.sum(-2, keepdim=True)
    return m


def written_under_another_name(s: Tensor) -> Tensor:
    flat = s.flatten(-2)
    return written_into_its_logits(s) + 0.0 * flat.unflatten(-1, (4, 4))


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        (written_into_its_logits, None),
        (written_under_another_name, "sinkhorn: an in-place write whose buffer has a second name, `"),
    ],
)
def test_a_chain_in_place_is_raised_only_if_its_buffer_has_one_name(
    spelling: Callable[[Tensor], Tensor], reason: str | None
) -> None:
    frozen = model(Pieces(sinkhorn=spelling), sites=1).requires_grad_(False)
    got = raised(frozen, tokens())
    assert got.ops.get("sinkhorn", 0) == 0
    if reason is None:
        assert got.reasons == []
        assert got.ops["coefficients"] == 1
    else:
        assert any(r.startswith(reason) for r in got.reasons), got.reasons
    got.assert_same(grad=False)
