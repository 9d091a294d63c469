"""No kernel cares how its arguments lie in memory: see test_interpreter.py and test_on_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from mhc_compile.config import Options
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.ops import CoefficientSpec, SinkhornSpec
from tests.lowering.calls import NAMES, small
from tests.lowering.graphs import close, gradients, inputs, lowered
from tests.lowering.operands import N

pytestmark = pytest.mark.usefixtures("poisoned")


def odd(value: Tensor) -> Tensor:
    """The same numbers at an offset, the dimensions in reverse order, every second element."""
    order = list(reversed(range(value.dim())))
    room = value.new_full((3, *(2 * value.shape[i] for i in order)), float("nan"))[1]
    view = room[tuple(slice(None, None, 2) for _ in order)].permute(order)
    return view.copy_(value)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_of_any_strides(name: str) -> None:
    """One argument after the other is a view, then all of them: the same bits."""
    op = getattr(torch.ops.mhc_kernel, name).default
    for arguments in small()[name]:
        want = op(*arguments)
        leaves, shape = tree_flatten(arguments)
        tensors = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        for places in [*([place] for place in tensors), tensors]:
            changed: list[Any] = [odd(leaf) if place in places else leaf for place, leaf in enumerate(leaves)]
            got = op(*tree_unflatten(changed, shape))
            torch.testing.assert_close(got, want, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 70])
def test_a_model_that_keeps_phi_as_the_paper_does(tokens: int, dtype: torch.dtype) -> None:
    """phi [nC, K] reaches `coefficients` as a view: forward and gradients through both lowered graphs."""
    spec = CoefficientSpec(sinkhorn=SinkhornSpec(steps=4))

    def site(x: Tensor, phi: Tensor, bias: Tensor, *alphas: Tensor) -> Tensor:
        state = torch.ops.mhc.expand.default(x, N)
        pre, post, res, _ = torch.ops.mhc.coefficients.default(state, phi.t(), bias, *alphas, **spec.op_arguments())
        return torch.ops.mhc.post.default(state, torch.ops.mhc.pre.default(state, pre).tanh(), post, res, False)

    x, _, phi, bias, *alphas = inputs(tokens, dtype=dtype)[:7]
    own = [x, phi.detach().t().contiguous().requires_grad_(), bias, *alphas]
    exact = gradients(site, [value.detach().double().requires_grad_() for value in own])
    close(gradients(lowered(site, Options(), LoweringLog(), []), own), exact, 1e-5 if dtype == torch.float32 else 0.05)
