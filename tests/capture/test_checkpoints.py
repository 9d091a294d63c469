"""Activation checkpoints around residual blocks: the same numbers, and the recomputation that was asked for."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mhc_compile.convert import Conversion
from mhc_compile.errors import LayoutError
from tests.passes.models import Block, Stack, assert_same, conversions, parameters_of, run, tokens

OPTIONS = {"compiler": "aot_eager", "streams": 2, "sinkhorn_iters": 1}


def stack(use: Any = None, **settings: Any) -> Stack:
    torch.manual_seed(0)
    blocks = [Block(), Block()]
    if use is None:
        return Stack(blocks)
    return Stack(blocks, lambda layer, x: checkpoint(layer, x, **settings))


def step(model: Stack, backend: dict[str, Any] | None) -> tuple[Tensor, list[Tensor], int]:
    """Loss, gradients of the plain parameters, and the number of elements kept for the backward."""
    kept = [0]

    def pack(tensor: Tensor) -> Tensor:
        kept[0] += tensor.numel()
        return tensor

    plain = list(model.parameters())
    call = model if backend is None else torch.compile(model, backend="mhc", options=backend)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = call(tokens()).square().sum()
    loss.backward()
    return loss.detach(), [p.grad for p in plain if p.grad is not None], kept[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_same_numbers_and_less_kept(reentrant: bool) -> None:
    loss, gradients, kept = step(stack(), OPTIONS)
    torch._dynamo.reset()
    again, others, less = step(stack(True, use_reentrant=reentrant), OPTIONS)
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-6)
    assert_same(others, gradients, 1e-4, 1e-5)
    assert less < 0.8 * kept


def test_dropout_draws_the_same_in_the_recomputation() -> None:
    """The gradient of a checkpointed block with dropout is that of its forward: compared with finite differences."""

    def body(layer: Any, x: Tensor) -> Tensor:
        return checkpoint(lambda v: torch.nn.functional.dropout(layer(v), 0.5) + v, x, use_reentrant=False)

    model = Stack([Block(), Block()], body).double()
    compiled = torch.compile(model, backend="mhc", options=OPTIONS)
    x = tokens(dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(5)
        return compiled(x).square().sum()

    loss().backward()
    weight = model.layers[0].mlp.down.weight
    assert weight.grad is not None
    for i, j in ((0, 0), (3, 5)):
        with torch.no_grad():
            weight[i, j] += 1e-6
            up = loss()
            weight[i, j] -= 2e-6
            down = loss()
            weight[i, j] += 1e-6
        torch.testing.assert_close((up - down) / 2e-6, weight.grad[i, j], rtol=1e-4, atol=1e-6)


def test_bodies_are_opened_and_tagged() -> None:
    gm, example, (outcome,) = conversions(stack(True, use_reentrant=False), [tokens()], [{"streams": 2}])
    assert isinstance(outcome, Conversion)
    assert len(outcome.report.sites) == 4
    names = [str(n.target) for n in outcome.gm.graph.nodes]
    assert not any("checkpoint" in name for name in names)
    groups = {n.meta["ac_graph_id"] for n in outcome.gm.graph.nodes if "ac_graph_id" in n.meta}
    assert len(groups) == 2
    linears = [n for n in outcome.gm.graph.nodes if getattr(n.target, "__name__", "") == "linear"]
    assert [n.meta.get("recompute") for n in linears] == [None, *[CheckpointPolicy.PREFER_RECOMPUTE] * 10, None]
    wanted = parameters_of(example)
    assert_same(run(outcome.gm, outcome.inputs, wanted)[1], run(gm, example, wanted)[1], 1e-4, 1e-5)


def test_selective_checkpoint_is_refused() -> None:
    context = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    model = stack(True, use_reentrant=False, context_fn=context)
    with pytest.raises(LayoutError, match="selective"):
        torch.compile(model, backend="mhc", options=OPTIONS)(tokens())
