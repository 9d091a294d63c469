"""The rewrite keeps the plain model's numbers at the start, whatever the variant, and touches nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhc_compile import ops
from mhc_compile.convert import Conversion
from mhc_compile.errors import MhcError
from tests.passes import cases_starts  # noqa: F401 - registers its models
from tests.passes.cases import CASES, Case
from tests.passes.cases_models import MODELS
from tests.passes.models import (
    WIDTH,
    Block,
    Stack,
    assert_same,
    conversions,
    exact_start,
    hyper,
    parameters_of,
    randomise,
    run,
    tokens,
)

SECOND = [
    {"variant": "identity", "streams": 3},
    {"variant": "hc", "streams": 2},
    {"variant": "mhc", "streams": 8, "collapse": "learned"},
]
QUICK = {"sinkhorn_iters": 2}


@pytest.mark.parametrize("case", [*CASES, *MODELS], ids=str)
def test_case(case: Case) -> None:
    """At step 0 outputs and gradients are the plain model's; from a random point every parameter of ours learns."""
    model = case.build()
    low = any(p.dtype != torch.float32 for p in model.parameters())
    inputs = list(case.inputs())
    if not low:
        model, inputs = model.double(), [v.double() if v.is_floating_point() else v for v in inputs]
    second = SECOND[[*CASES, *MODELS].index(case) % len(SECOND)]
    settings = [{**QUICK, **s, **case.options} for s in ({"variant": "single_pass"}, second, {"variant": "mhc"})]
    gm, example, outcomes = conversions(model, inputs, settings)
    wanted = parameters_of(example)
    expected = run(gm, example, wanted)
    tolerance = (3e-2, 3e-2) if low else (1e-10, 1e-10)
    for setting, outcome in zip(settings, outcomes, strict=True):
        if not case.single_pass and setting["variant"] == "single_pass":
            assert isinstance(outcome, MhcError)
            assert "token layout" in str(outcome)
            continue
        assert isinstance(outcome, Conversion), outcome
        outcome.gm.graph.lint()
        exact_start(outcome)
        actual = run(outcome.gm, outcome.inputs, wanted)
        assert_same(actual[0], expected[0], *tolerance, f"{setting} outputs")
        assert_same(actual[1], expected[1], *tolerance, f"{setting} gradients")
    assert isinstance(outcome, Conversion)
    randomise(outcome)
    parameters = parameters_of(outcome.inputs)
    gradients = run(outcome.gm, outcome.inputs, parameters)[1]
    for before, after in zip(expected[1], gradients, strict=False):
        assert (before is not None and bool(before.any())) == (after is not None and bool(after.any()))
    ours = gradients[len(wanted) :]
    assert len(ours) == sum(len(list(module.parameters())) for module in hyper(outcome).values())
    assert all(g is not None and g.isfinite().all() and g.any() for g in ours)
    count = len(outcome.gm.graph.nodes)
    outcome.gm.graph.eliminate_dead_code()
    assert len(outcome.gm.graph.nodes) == count


def test_the_first_branch_of_single_pass_reads_what_is_expanded() -> None:
    """Not one of the equal streams, whose gradient would be n streams wide."""
    _, _, (outcome,) = conversions(Stack([Block(), Block()]), [tokens()], [{**QUICK, "variant": "single_pass"}])
    assert isinstance(outcome, Conversion), outcome
    nodes = list(outcome.gm.graph.nodes)
    (expand,) = [node for node in nodes if node.target is ops.expand.overload]
    assert len(expand.args[0].users) > 1
    assert {node.target for node in expand.users} <= {ops.coefficients.overload, ops.post.overload}
    assert not any(node.target == "select" for node in nodes)


def test_single_precision_start() -> None:
    """With the fp32 start as it is made."""
    settings = [{"streams": n, "variant": v} for n in (2, 3, 4, 8) for v in ("mhc", "identity", "hc", "single_pass")]
    gm, example, outcomes = conversions(Stack([Block(), Block()]), [tokens()], settings)
    wanted = parameters_of(example)
    expected = run(gm, example, wanted)
    for setting, outcome in zip(settings, outcomes, strict=True):
        assert isinstance(outcome, Conversion)
        actual = run(outcome.gm, outcome.inputs, wanted)
        assert_same(actual[0], expected[0], 1e-5, 1e-6, str(setting))
        assert_same(actual[1], expected[1], 1e-5, 2e-5, str(setting))


# ----------------------------------------------------------------------------------------------- a second writing
class Reference:
    """mHC by the formulas of arXiv 2512.24880 (14-19) and of 1-math, with einsum, from parameters by name."""

    def __init__(self, parameters: dict[str, nn.Module], variant: str, n: int, rounds: int, collapse: str) -> None:
        self.parameters, self.variant, self.n, self.rounds, self.collapse = parameters, variant, n, rounds, collapse
        self.gate: Tensor | None = None

    def numbers(self, name: str, x: Tensor) -> list[Tensor]:
        """H_pre, H_post, H_res of a site from x [..., n, C]."""
        site: Any = self.parameters[name]
        n = self.n
        flat = x.flatten(-2)
        r = (flat.square().mean(-1, keepdim=True) + site.spec.norm_eps).sqrt()
        p = torch.einsum("...d,kd->...k", flat, site.phi) / r
        pre = p[..., :n] * site.alpha_pre + site.bias[:n]
        if p.shape[-1] == n:
            return [pre.sigmoid()]
        post = p[..., n : 2 * n] * site.alpha_post + site.bias[n : 2 * n]
        linear = self.variant == "hc"
        result = [pre if linear else pre.sigmoid(), post if linear else 2 * post.sigmoid()]
        if self.variant == "identity":
            return [*result, torch.eye(n, dtype=x.dtype)]
        res = (p[..., 2 * n :] * site.alpha_res + site.bias[2 * n :]).unflatten(-1, (n, n))
        if not linear:
            res = res.softmax(-1) + 1e-6
            for _ in range(self.rounds):
                res = res / res.sum(-2, keepdim=True)
                res = res / res.sum(-1, keepdim=True)
        return [*result, res]

    def site(self, name: str, x: Tensor, branch: Any) -> Tensor:
        pre, post, res = self.numbers(name, x)
        if self.variant == "single_pass":
            u = x[..., 0, :] if self.gate is None else torch.einsum("...n,...nc->...c", self.gate, x)
            self.gate = pre
        else:
            u = torch.einsum("...n,...nc->...c", pre, x)
        mixed = torch.einsum("...on,...nc->...oc", res.expand(*x.shape[:-2], self.n, self.n), x)
        return mixed + torch.einsum("...o,...c->...oc", post, branch(u))

    def read(self, x: Tensor, head: str | None = None) -> Tensor:
        if self.variant == "single_pass":
            return torch.einsum("...n,...nc->...c", self.gate, x)
        if self.collapse == "learned" and head is not None:
            return torch.einsum("...n,...nc->...c", self.numbers(head, x)[0], x)
        return x.sum(-2) if self.collapse == "sum" else x.mean(-2)


class Trunk(nn.Module):
    """Two blocks on [B, T, C]; also returns the stream between them, which a probe reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), nn.ModuleList([Block(), Block()])
        self.norm, self.probe = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layers[0](self.embed(x))
        seen = self.probe(x)
        return self.norm(self.layers[1](x)), seen

    def reference(self, x: Tensor, by: Reference) -> tuple[Tensor, Tensor]:
        state = torch.stack([self.embed(x)] * by.n, -2)
        seen = None
        for i, layer in enumerate(self.layers):
            state = by.site(f"layers.{i}.mhc0", state, layer.attn)
            state = by.site(f"layers.{i}.mhc1", state, layer.mlp)
            if i == 0:
                seen = self.probe(by.read(state))
        assert seen is not None
        return self.norm(by.read(state, "layers.1.mhc_head")), seen


@pytest.mark.parametrize("collapse", ["mean", "sum", "learned"])
@pytest.mark.parametrize("variant", ["mhc", "identity", "hc", "single_pass"])
def test_agrees_with_a_second_writing(variant: str, collapse: str) -> None:
    """From random parameters: outputs, gradients of the model's and of our parameters, and of the input, in fp64."""
    model, x = Trunk().double(), tokens(dtype=torch.float64).requires_grad_()
    settings = [
        {"variant": variant, "collapse": collapse, "init": "paper", "streams": n, "sinkhorn_iters": rounds}
        for n, rounds in ((4, 3), (2, 1), (3, 2))
    ]
    _, _, outcomes = conversions(model, [x], settings)
    for setting, outcome in zip(settings, outcomes, strict=True):
        assert isinstance(outcome, Conversion), outcome
        randomise(outcome)
        parameters = hyper(outcome)
        assert len(parameters) == 4 + (collapse == "learned" and variant != "single_pass")
        wanted = [x, *model.parameters(), *(p for module in parameters.values() for p in module.parameters())]
        actual = run(outcome.gm, outcome.inputs, wanted)
        by = Reference(parameters, variant, setting["streams"], setting["sinkhorn_iters"], collapse)
        expected = run(lambda value, by=by: model.reference(value, by), [x], wanted)
        assert_same(actual[0], expected[0], 1e-12, 1e-12, f"{setting} outputs")
        assert_same(actual[1], expected[1], 1e-10, 1e-10, f"{setting} gradients")
