"""The rewritten graph itself: how it reads, that it is stable, and that dtypes and sizes go through it."""

from __future__ import annotations

from typing import Any

import expecttest
import pytest
import torch
from torch import fx

import mhc_compile
from mhc_compile import ops
from mhc_compile.backend import reports
from mhc_compile.capture.graph import meta_value
from mhc_compile.config import Options
from mhc_compile.passes import PassContext
from mhc_compile.passes.find_sites import find_sites
from mhc_compile.passes.widen import widen
from tests.tiny import Flat, compiled, ids, loss_of, tiny


def test_the_graph_of_two_sites() -> None:
    model = Flat(sites=2, width=4)
    graph = mhc_compile.explain(model, torch.randn(2, 3, 4), streams=2, sinkhorn_iters=1).graph
    lines = [line.split("  #")[0] for line in graph.splitlines() if "placeholder" not in line]
    short = [line.split("(")[0] + "(...)" if "coefficients.default" in line else line for line in lines]
    text = "\n".join(short).replace("l_self_modules_", "").replace("_modules", "").replace("_parameters", "")
    expecttest.assert_expected_inline(
        text,
        """\
expand_default: float32[2, 3, 2, 4] = mhc.expand.default(l_x_, 2)
coefficients_default = mhc.coefficients.default(...)
getitem: float32[2, 3, 2] = getitem(coefficients_default, 0)
getitem_1: float32[2, 3, 2] = getitem(coefficients_default, 1)
getitem_2: float32[2, 3, 2, 2] = getitem(coefficients_default, 2)
pre_default: float32[2, 3, 4] = mhc.pre.default(expand_default, getitem)
linear: float32[2, 3, 4] = linear(pre_default, inner_0_weight_, inner_0_bias_)
tanh: float32[2, 3, 4] = tanh(linear)
post_default: float32[2, 3, 2, 4] = mhc.post.default(expand_default, tanh, getitem_1, getitem_2, False)
coefficients_default_1 = mhc.coefficients.default(...)
getitem_3: float32[2, 3, 2] = getitem(coefficients_default_1, 0)
getitem_4: float32[2, 3, 2] = getitem(coefficients_default_1, 1)
getitem_5: float32[2, 3, 2, 2] = getitem(coefficients_default_1, 2)
pre_default_1: float32[2, 3, 4] = mhc.pre.default(post_default, getitem_3)
linear_1: float32[2, 3, 4] = linear(pre_default_1, inner_1_weight_, inner_1_bias_)
tanh_1: float32[2, 3, 4] = tanh(linear_1)
post_default_1: float32[2, 3, 2, 4] = mhc.post.default(post_default, tanh_1, getitem_4, getitem_5, False)
collapse_default: float32[2, 3, 4] = mhc.collapse.default(post_default_1, mean)
layer_norm: float32[2, 3, 4] = layer_norm(collapse_default, (4,), norm_weight_, norm_bias_, 1e-05)
output = output((layer_norm,))""",
    )


def converted(model: Any, *inputs: Any, **options: Any) -> fx.GraphModule:
    """The rewritten graph that the compiler gets."""
    kept: list[fx.GraphModule] = []
    from mhc_compile import compat

    original = compat.lookup_backend

    def keep(name: str) -> Any:
        def compile_graph(gm: fx.GraphModule, example: Any) -> Any:
            kept.append(gm)
            return original("eager")(gm, example)

        return compile_graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "lookup_backend", keep)
        compiled(model, **options)(*inputs)
    return kept[0]


def test_again_finds_nothing_and_no_dead_node_is_left() -> None:
    gm = converted(tiny(), ids())
    ctx = PassContext(Options(), is_parameter=lambda node: node.op == "placeholder" and "ids" not in node.name)
    before = [node.name for node in gm.graph.nodes]
    assert find_sites(gm, ctx).changed == widen(gm, ctx).changed == 0
    assert [node.name for node in gm.graph.nodes] == before
    gm.graph.lint()
    assert not gm.graph.eliminate_dead_code()
    assert sum(node.target is ops.post.overload for node in gm.graph.nodes) == 4


def test_every_new_node_has_its_value_and_its_line() -> None:
    gm = converted(tiny(), ids())
    ours = [node for node in gm.graph.nodes if "mhc::" in str(getattr(node.target, "_schema", ""))]
    assert len(ours) == 1 + 4 * 3 + 1
    assert all(meta_value(node) is not None for node in ours)
    assert all("tests/tiny.py" in (node.meta.get("stack_trace") or "") for node in ours)


def test_one_more_compilation_for_any_number_of_tokens() -> None:
    model = tiny()
    call = compiled(model)
    reports.clear()
    for length in (5, 6, 9, 13):
        plain = tiny()(ids(length=length))
        torch.testing.assert_close(call(ids(length=length)), plain, rtol=1e-5, atol=1e-6)
    assert len(reports) == 2


@pytest.mark.parametrize("variant", ["mhc", "identity", "hc", "single_pass"])
def test_autocast_changes_the_branches_and_not_the_coefficients(variant: str) -> None:
    plain, model = tiny(), tiny()
    call = compiled(model, variant=variant)
    with torch.autocast("cpu", torch.bfloat16):
        want, have = plain(ids()), call(ids())
    assert have.dtype == want.dtype
    torch.testing.assert_close(have.float(), want.float(), rtol=2e-2, atol=2e-2)
    loss_of(have).backward()
    grads = [p.grad for n, p in model.named_parameters() if "mhc" in n]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_a_bfloat16_model_keeps_its_streams_in_bfloat16() -> None:
    gm = converted(tiny().bfloat16(), ids())
    states = [
        meta_value(node).dtype for node in gm.graph.nodes if node.target in (ops.expand.overload, ops.post.overload)
    ]
    assert set(states) == {torch.bfloat16}
    plain, model = tiny().bfloat16(), tiny().bfloat16()
    torch.testing.assert_close(compiled(model)(ids()), plain(ids()), rtol=2e-2, atol=2e-2)
