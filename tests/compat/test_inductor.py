"""The private seams of inductor and Triton that are used are still where they were; loud when one moves."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mhc_compile import compat
from mhc_compile.compat import inductor as inductor_compat


def test_backends_and_inductor() -> None:
    assert callable(compat.lookup_backend("eager"))
    assert callable(compat.lookup_backend("aot_eager"))
    import inspect

    import torch._inductor

    assert list(inspect.signature(torch._inductor.compile).parameters)[:3] == ["gm", "example_inputs", "options"]
    assert torch.ops.aten.addmm.default in compat.inductor_decompositions() or compat.inductor_decompositions()


@pytest.mark.parametrize("gradients", [False, True])
def test_what_runs_a_graph_of_inductor_s_can_be_surrounded(gradients: bool) -> None:
    """Forward and backward, each with its code; what is given back is what runs."""
    sources: list[str] = []
    ran: list[int] = []

    def around(source: str, run: Any) -> Any:
        sources.append(source)
        number = len(sources)

        def surrounded(inputs: list[Any]) -> Any:
            ran.append(number)
            return run(inputs)

        return surrounded

    def backend(gm: Any, inputs: Any) -> Any:
        return compat.inductor_compile(gm, inputs, {}, around)

    x, call = torch.randn(4, 4, requires_grad=gradients), torch.compile(lambda x: (x @ x).sin(), backend=backend)
    for _ in range(2):
        out = call(x)
        if gradients:
            out.sum().backward()
    torch.testing.assert_close(out, (x @ x).sin())
    assert len(sources) == 1 + gradients
    assert all("def call" in source for source in sources)
    assert ran == ([1, 2] * 2 if gradients else [1] * 2)


@pytest.mark.parametrize("theirs", [None, "one", "list"])
def test_graph_passes_are_chained(theirs: str | None) -> None:
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass

    order: list[str] = []

    class Pass(CustomGraphPass):
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, graph: Any) -> None:
            order.append(self.name)

        def uuid(self) -> Any:
            return self.name

    values = {None: None, "one": Pass("theirs"), "list": [Pass("theirs"), Pass("more")]}
    with config.patch({"post_grad_custom_pre_pass": values[theirs]}):
        chained = compat.chain_graph_passes("post_grad_custom_pre_pass", Pass("ours"))
    chained(torch.fx.Graph())
    assert order == {None: ["ours"], "one": ["theirs", "ours"], "list": ["theirs", "more", "ours"]}[theirs]
    assert chained.uuid() is not None


def test_triton_version_is_read_without_importing_it() -> None:
    assert isinstance(compat.triton_version(), str)


def test_real_tensors_within_a_trace() -> None:
    """Outside of it nothing is recorded and nothing is fake; behind it the trace goes on."""
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    found: list[torch.Tensor] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        with compat.outside_of_tracing():
            found.append(torch.ones(3, requires_grad=True).exp())
        return y * 2

    with FakeTensorMode() as mode:
        graph = make_fx(body)(torch.empty(4)).graph
        assert type(torch.empty(1)) is not torch.Tensor
    assert mode is not None
    assert [node.op for node in graph.nodes] == ["placeholder", "call_function", "call_function", "output"]
    assert type(found[0]) is torch.Tensor
    assert found[0].tolist() == pytest.approx([2.718281828] * 3)
    assert not found[0].requires_grad


def test_a_kernel_is_analysed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's question which tensors a launch writes: answered once for each kernel, constants and dtypes, and asked
    again for another package's."""
    from torch._higher_order_ops import triton_kernel_wrap
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked: list[Any] = []

    def analysis(kernel: Any, kwargs: dict[str, Any], tma_descriptor_metadata: Any) -> list[str]:
        asked.append(kernel)
        return [name for name in kwargs if name.startswith("out")]

    there = [name for name in inductor_compat._ANALYSES if hasattr(triton_kernel_wrap, name)]
    assert there, "torch has moved the analysis of a kernel"
    for name in there:
        monkeypatch.setattr(triton_kernel_wrap, name, analysis)
    compat.remember_kernel_analysis("mhc_compile")
    compat.remember_kernel_analysis("mhc_compile")  # no memo around the memo
    remembered = getattr(triton_kernel_wrap, there[0])
    assert remembered.__wrapped__ is analysis

    def kernel(module: str) -> Any:
        def body() -> None:
            """Never run."""

        body.__module__ = module
        return SimpleNamespace(fn=body)

    with FakeTensorMode():
        x, wide = torch.empty(4, dtype=torch.bfloat16), torch.empty(4)
    ours, theirs = kernel("mhc_compile.lowering.post"), kernel("elsewhere.kernels")
    first = remembered(ours, {"x": x, "out": x, "C": 8}, {})
    assert first == ["out"]
    first.append("changed by the caller")
    assert remembered(ours, {"x": x, "out": x, "C": 8}, {}) == ["out"]
    assert len(asked) == 1
    for other in ({"x": wide, "out": x, "C": 8}, {"x": x, "out": x, "C": 9}, {"x": x, "out": x, "C": True}):
        remembered(ours, other, {})
    assert len(asked) == 4
    for _ in range(2):
        remembered(theirs, {"x": x, "out": x, "C": 8}, {})
        remembered(ours, {"x": x, "out": object()}, {})
        remembered(ours, {"x": x, "out": x, "C": 8}, {"x": "descriptor"})
    assert len(asked) == 10


def test_what_is_declared_inductor_does_not_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The description's length doubles along a chain of calls, and torch 2.11 writes it each time."""
    from torch._inductor import config, exc
    from torch._inductor.lowering import lowerings

    described: list[Any] = []
    original = exc.OperatorIssue.operator_str
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", lambda *args: described.append(args) or original(*args))
    for name in ("exact", "flexible"):  # two ops with the layouts that ours ask for
        tag = {"exact": torch.Tag.needs_exact_strides, "flexible": torch.Tag.flexible_layout}[name]
        op = torch.library.custom_op(
            f"mhc_compat_tests::{name}", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor", tags=(tag,)
        )
        op.register_fake(torch.empty_like)
    ours = torch.ops.mhc_compat_tests
    compat.declare_fallbacks([ours.exact.default, ours.flexible.default])
    handler = lowerings[ours.exact.default]
    compat.declare_fallbacks([ours.exact.default])
    assert lowerings[ours.exact.default] is handler

    def chain(x: torch.Tensor) -> torch.Tensor:
        return ours.flexible(ours.exact(x.t() + 1)) * 2

    x = torch.randn(3, 4)
    with config.patch(fx_graph_cache=False):
        torch.testing.assert_close(torch.compile(chain, fullgraph=True)(x), (x.t() + 1) * 2)
    assert described == []


def test_inductor_looks_the_analysis_up_when_it_asks() -> None:
    """A memo that is put into the module must be the one that is called."""
    from torch._inductor import ir

    source = inspect.getsource(ir.UserDefinedTritonKernel.__init__)
    assert any(f"import {name}" in source or f"{name}," in source for name in inductor_compat._ANALYSES), source


def test_fused_operations_round_where_they_are_told_to() -> None:
    """Torch 2.11 forgets it in its C++ kernels: it reads on what was there before the rounding."""
    from torch._inductor.codegen.cpp import CppKernel

    def function(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x * w).float() * 3.3).to(x.dtype) * w + x

    compat.keep_rounding_in_cpp()
    once = CppKernel.cache_dtype_convert
    compat.keep_rounding_in_cpp()
    assert CppKernel.cache_dtype_convert is once
    x, w = torch.randn(64, 64).to(torch.bfloat16), torch.randn(64).to(torch.bfloat16)
    for emulated in (True, False):  # False: that the function is one where it matters
        torch._dynamo.reset()
        compiled = torch.compile(function, options={"emulate_precision_casts": emulated})
        assert torch.equal(compiled(x, w), function(x, w)) == emulated


def test_inductor_s_joint_passes_can_be_switched_off() -> None:
    from torch._inductor import config

    assert compat.runs_joint_passes()
    with config.patch(use_joint_graph_passes=False):
        assert not compat.runs_joint_passes()
