"""The lowered forward and backward graphs with kernels, under the interpreter: see test_interpreter.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile.config import FUSIONS, Options, resolve
from mhc_compile.convert import convert
from mhc_compile.lowering.base import TARGETS, LoweringLog
from mhc_compile.lowering.inductor import LowerPass
from mhc_compile.ops import CoefficientSpec
from tests.lowering.graphs import SPEC, chain, close, gradients, inputs, lowered

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_chain_with_kernels(dtype: torch.dtype) -> None:
    log, seen = LoweringLog(), []
    compiled = lowered(chain, Options(), log, seen)
    for tokens in (5, 9):
        tensors = inputs(tokens, dtype=dtype)
        torch._dynamo.mark_dynamic(tensors[0], 1)
        exact = gradients(chain, [t.detach().double().requires_grad_() for t in inputs(tokens, dtype=dtype)])
        # The interpreter cuts bfloat16 off where a device rounds, once more where a kernel adds up streams.
        close(
            gradients(compiled, tensors), exact, {torch.float32: 1e-5, torch.float16: 0.05, torch.bfloat16: 0.08}[dtype]
        )
    assert len(seen) == 2, "one compile serves every length"
    counts = log.counts()
    assert counts["coefficients", "triton"] == counts["pre", "triton"] == counts["post", "triton"] == 2
    assert counts["coefficients_backward", "triton"] == counts["post_backward", "triton"] == 2
    assert counts["streams gradient", "fused"] == 2
    assert counts["site boundary", "fused"] == (0 if dtype == torch.float32 else 1)
    assert not any(node.target in TARGETS for gm in seen for node in gm.graph.nodes)


def test_fusion_off_gives_the_same_numbers() -> None:
    on, off = LoweringLog(), LoweringLog()
    a = gradients(lowered(chain, Options(), on, []), inputs(6))
    torch._dynamo.reset()
    b = gradients(lowered(chain, Options(fuse=False), off, []), inputs(6))
    assert off.counts()["streams gradient", "fused"] == 0
    close(a, b, 1e-5)


@pytest.mark.parametrize("kind", ["mhc", "identity", "single_pass", "shared", "kept", "kept, identity"])
def test_site_boundary(kind: str) -> None:
    """Three sites: the stream gradient and the dot products of the post before it are one call at both boundaries, but
    not where somebody else reads the state ("shared"). With u kept, the gradient of the gate is a part of it."""
    identity, known = "identity" in kind, kind == "single_pass" or "kept" in kind
    spec = CoefficientSpec(layout="pre,post", res="none", sinkhorn=None) if identity else SPEC
    rows = spec.rows

    def sites(x: Tensor, w: Tensor, *parameters: Tensor) -> Tensor:
        state = torch.ops.mhc.expand.default(x, 4)
        gate = torch.full((*x.shape[:-1], 4), 0.25, device=x.device)
        seen = 0.0
        for index in range(3):
            own = parameters[5 * index : 5 * index + 5]
            pre, post, res, _ = torch.ops.mhc.coefficients.default(state, *own, **spec.op_arguments())
            mix = gate if known else pre
            if "kept" in kind:
                u = torch.ops.mhc.pre_norm.default(state, mix, None, None, "rms", 1e-5, 0.0, False, True)[0]
            else:
                u = torch.ops.mhc.pre.default(state, mix)
            y = torch.nn.functional.silu(u @ w)
            state = torch.ops.mhc.post.default(state, y, post, None if identity else res, False)
            gate = pre
            if kind == "shared" and index < 2:
                seen = seen + state.float().sum(-2)
        return torch.ops.mhc.collapse.default(state, "mean").float() + seen

    def tensors(dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        made = [
            torch.randn(2, 9, 32, generator=generator).to(dtype),
            (torch.randn(32, 32, generator=generator) / 5).to(dtype),
        ]
        for _ in range(3):
            made += [torch.randn(rows, 128, generator=generator) / 10, torch.randn(rows, generator=generator)]
            made += [torch.tensor(0.3 + 0.1 * i) for i in range(3)]
        return [one.requires_grad_() for one in made]

    def run(function: Callable[..., Tensor], own: list[Tensor]) -> list[Tensor]:
        out = function(*own)
        found = torch.autograd.grad(out.double().square().sum(), own, allow_unused=True, materialize_grads=True)
        scalars = torch.stack([one for one in found if not one.dim()])  # taken together: a single one may cancel
        return [out.detach(), *(one for one in found if one.dim()), scalars]

    log, seen = LoweringLog(), []
    # Without `ends`: the interpreter cuts bfloat16 off where a device rounds, which sums of streams would show.
    fuse = tuple(name for name in FUSIONS if name != "ends")
    got = run(lowered(sites, Options(fuse=fuse), log, seen), tensors(torch.bfloat16))
    assert log.counts()["site boundary", "fused"] == (0 if kind == "shared" else 2)
    left = [str(node.target) for gm in seen for node in gm.graph.nodes if "mhc_kernel" in str(node.target)]
    assert left.count("mhc_kernel.post_dots.default") == (3 if kind == "shared" else 1)
    assert left.count("mhc_kernel.streams_backward.default") == (3 if kind == "shared" else 1)
    in_one = sum("gradient of the gate" in entry.reason for entry in log.entries)
    assert in_one == (2 if known else 0)
    assert left.count("mhc_kernel.pre_dots.default") == (3 if kind in ("mhc", "identity", "shared") else 0)
    if known:  # one call takes all three gradients of a site's coefficients, as they come
        assert left.count("aten.sum.dim_IntList") == 0
    torch._dynamo.reset()
    off = run(lowered(sites, Options(fuse=False), LoweringLog(), []), tensors(torch.bfloat16))
    exact = run(sites, [one.detach().double().requires_grad_() for one in tensors(torch.bfloat16)])
    for index, (a, b, c) in enumerate(zip(got, off, exact, strict=True)):
        scale = float(c.detach().norm())
        one, other = (float((value.double() - c).norm()) for value in (a, b))
        assert one <= 1.2 * other + 2e-3 * scale, (index, one, other, scale)


def test_site_boundary_through_inductor() -> None:
    """As opaque calls of the code that inductor writes, whose inputs it checks against what autograd has noted."""
    from mhc_compile.backend import mhc, reports
    from tests.tiny import ids, tiny

    results = []
    for fuse in (True, False):
        torch._dynamo.reset()
        model = tiny(layers=2, width=32).to(torch.bfloat16)
        options = {"init": "paper", "sinkhorn_iters": 1, "fuse": fuse}
        torch.compile(model, backend=mhc, options=options, fullgraph=True)(ids()).float().square().mean().backward()
        results.append([parameter.grad.double() for parameter in model.parameters() if parameter.grad is not None])
        assert reports[-1].log.counts()["site boundary", "fused"] == (3 if fuse else 0)
    whole = [torch.cat([one.flatten() for one in result]) for result in results]
    assert float((whole[0] - whole[1]).norm()) <= 0.02 * float(whole[1].norm())


def test_too_many_steps_run_the_native_backward() -> None:
    from mhc_compile.lowering import sinkhorn
    from mhc_compile.ops import SinkhornSpec

    assert "at most" in sinkhorn.spec_refusal(SinkhornSpec(steps=200), backward=True)
    assert sinkhorn.spec_refusal(SinkhornSpec(steps=200), backward=False) == ""


def test_a_plan_is_replayed_by_one_call() -> None:
    """The same bits with recompute on and off, and the block's sites are rebuilt by the kernel for them."""
    from mhc_compile.backend import mhc, reports
    from tests.tiny import ids, tiny

    results = []
    for recompute in ("off", 2000):
        torch._dynamo.reset()
        model = tiny(layers=2)
        options = {"recompute": recompute, "init": "paper", "sinkhorn_iters": 1}
        output = torch.compile(model, backend=mhc, options=options, fullgraph=True)(ids())
        output.float().square().mean().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
        replays = reports[-1].log.counts()["replay", "fused"]
        assert (replays > 0) == (recompute != "off")
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)


def trained(variant: str, recompute: str | int, fuse: bool | tuple[str, ...]) -> tuple[list[Tensor], list[str]]:
    """Output and gradients of a model whose two graphs are lowered and not compiled, and what the log says of
    replays."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    from tests.tiny import ids, tiny

    options = {"variant": variant, "recompute": recompute, "init": "paper", "fuse": fuse, "sinkhorn_iters": 1}
    resolved, log = resolve(options, None), LoweringLog()

    def lower(gm: Any, _: Any) -> Any:
        LowerPass(resolved.options, log)(gm.graph)
        gm.recompile()
        return make_boxed_func(gm.forward)

    def backend(gm: Any, inputs: Any) -> Any:
        conversion = convert(gm, inputs, resolved)
        compiled = aot_autograd(
            fw_compiler=lower, bw_compiler=lower, partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )(conversion.gm, conversion.inputs)  # fmt: skip
        wanted.extend(value for value in conversion.parameters.values if isinstance(value, torch.nn.Parameter))
        return lambda *args: compiled(*args, *conversion.parameters.values)

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = tiny(layers=2)
    wanted: list[Tensor] = list(model.parameters())
    output = torch.compile(model, backend=backend, fullgraph=True)(ids())
    gradients = torch.autograd.grad(output.float().square().mean(), wanted)
    said = [entry.reason for entry in log.entries if (entry.op, entry.provider) == ("replay", "fused")]
    return [output.detach(), *gradients], said


@pytest.mark.parametrize("variant", ["mhc", "single_pass", "identity"])
def test_a_plan_with_norms_is_replayed_by_one_call(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits with a plan and without one, with the kernel for several sites and without it."""
    module = importlib.import_module("mhc_compile.passes.fold_norms")
    monkeypatch.setattr(module, "_kernel_refusal", lambda named: "")
    others = tuple(name for name in FUSIONS if name != "replay")
    off, none = trained(variant, "off", True)
    on, some = trained(variant, 2000, True)
    alone, nothing = trained(variant, 2000, others)
    assert (none, nothing) == ([], [])
    assert any("with the norm of the branch input" in reason for reason in some), some
    assert all(torch.equal(one, other) for one, other in zip(on, alone, strict=True))
    if variant != "single_pass":  # the expanded X_0 is a view here, of which ATen's product for dphi sums otherwise
        assert all(torch.equal(one, other) for one, other in zip(off, on, strict=True))
