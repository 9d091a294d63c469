"""Hyper-connections written by hand get the kernels and the fusions of converted ones: see test_interpreter.py."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mhc_compile.config import resolve
from mhc_compile.convert import convert
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from tests.lowering.graphs import close, gradients
from tests.spellings import site as spelling

WIDTH = 32


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is the model that the others are compared with."""
    return x.float() if x.dtype == torch.bfloat16 else x


# As Hugging Face's DeepSeek-V4: gates in float32, streams in 16 bits.
PIECES = spelling.Pieces(
    norm=lambda x: spelling.rms_before(wide(x)),
    mix=lambda h, x: h.to(x.dtype) @ x,
    pre=lambda h, x: (h.unsqueeze(-1) * wide(x)).sum(-2).to(x.dtype),
    outer=lambda h, y: h.to(y.dtype).unsqueeze(-1) * y.unsqueeze(-2),
)


class InputsByOutputs(spelling.Site):
    """phi as the paper has it, [nC, K]."""

    def __init__(self) -> None:
        super().__init__(PIECES, width=WIDTH)
        self.phi = nn.Parameter(self.phi.detach().t().contiguous())

    def project(self, x: Tensor) -> Tensor:
        """[..., nC] -> the logits of all gates."""
        return x @ self.phi


def model(make: Any) -> spelling.Model:
    """Three sites; branches in bf16, the rest in float32."""
    torch.manual_seed(0)
    found = spelling.Model([make() for _ in range(3)])
    for site in found.sites:
        site.branch.to(torch.bfloat16)  # type: ignore[union-attr]  # every one is a Site
    return found


def lowered(function: nn.Module, log: LoweringLog) -> Any:
    """Raised, then through AOTAutograd and our graph passes."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        resolved = resolve({"rewrite": False}, None)
        conversion = convert(gm, inputs, resolved)

        def compiler(part: fx.GraphModule, _: Sequence[Any]) -> Any:
            LowerPass(resolved.options, log)(part.graph)
            part.recompile()
            return make_boxed_func(part.forward)

        return aot_autograd(
            fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )(conversion.gm, conversion.inputs)  # fmt: skip

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


@pytest.mark.parametrize("make", [lambda: spelling.Site(PIECES, width=WIDTH), InputsByOutputs], ids=["KxnC", "nCxK"])
def test_a_spelled_model_gets_the_fusions_and_the_numbers(make: Any) -> None:
    mine, log = model(make), LoweringLog()
    x = torch.randn(1, 70, WIDTH, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    exact = copy.deepcopy(mine).double()
    tensors = list(mine.parameters())
    want = gradients(lambda *_: exact(x.double()), list(exact.parameters()))
    compiled = lowered(mine, log)
    got = gradients(lambda *_: compiled(x), tensors)
    counts = log.counts()
    assert counts["site boundary", "fused"] == 2
    assert counts["coefficients", "triton"] == counts["post", "triton"] == 3
    close(got, want, 0.05)  # the interpreter cuts to bf16, it does not round
