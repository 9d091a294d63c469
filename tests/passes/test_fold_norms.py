"""fold_norms: the norms of Hugging Face and torch behind a pre become one op, with the same numbers; what is left."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint

from mhc_compile import ops
from mhc_compile.capture import copy_graph
from mhc_compile.config import Options
from mhc_compile.convert import Conversion
from mhc_compile.passes import PassContext, PassResult
from mhc_compile.passes.fold_norms import fold, fold_norms
from mhc_compile.passes.recompute import PLAN_KEY, plan_key
from tests.passes.models import WIDTH, Attention, Block, Lambda, Mlp, Stack, conversions, randomise, run, tokens

C, N = 16, 4
BF16, FP32 = torch.bfloat16, torch.float32
HF = {
    "LlamaRMSNorm": "llama",
    "Gemma3RMSNorm": "gemma3",
    "Gemma4RMSNorm": "gemma4",
    "MoshiRMSNorm": "moshi",
    "Llama4TextRMSNorm": "llama4",
    "GptOssRMSNorm": "gpt_oss",
    "NemotronHRMSNorm": "nemotron_h",
    "CohereLayerNorm": "cohere",
    "OlmoLayerNorm": "olmo",
    "T5LayerNorm": "t5",
    "CpmAntLayerNorm": "cpmant",
    "ImageGPTLayerNorm": "imagegpt",
    "MoonshineStreamingLayerNorm": "moonshine_streaming",
}
ONLY_FLOAT32 = {"ImageGPTLayerNorm", "MoonshineStreamingLayerNorm"}
"""Reduce in the dtype they are given, or round the weight plus one: in bf16 these are other functions."""


def norm(name: str) -> nn.Module:
    """A norm over C channels with weights that are not ones."""
    if name in HF:
        kind = getattr(importlib.import_module(f"transformers.models.{HF[name]}.modeling_{HF[name]}"), name)
        module = kind(SimpleNamespace(eps=1e-6, hidden_size=C) if name == "CpmAntLayerNorm" else C)
    else:
        module = {"LayerNorm": lambda: nn.LayerNorm(C), "RMSNorm": lambda: nn.RMSNorm(C, eps=1e-6)}[name]()
    generator = torch.Generator().manual_seed(1)
    for own, parameter in module.named_parameters():  # ImageGPT's weight is memory that nobody has written to
        start = 0.0 if "bias" in own else 1.0
        parameter.data = start + 0.3 * torch.randn(parameter.shape, generator=generator)
    return module


def mixed(branch: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The branch behind a pre."""
    return lambda self, x, h: branch(torch.ops.mhc.pre.default(x, h))


def capture(model: nn.Module, *inputs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """Dynamo's graph, to be edited, and its inputs."""
    captured: list[Any] = []

    def keep(gm: fx.GraphModule, example: list[Any]) -> Any:
        captured[:] = [copy_graph(gm), list(example)]
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, dynamic=False, fullgraph=True)(*inputs)
    return captured[0], captured[1]


def folded(gm: fx.GraphModule, **options: Any) -> PassResult:
    """The pass with every device allowed."""
    result = fold(gm, PassContext(Options(**options)), lambda named: "")
    gm.graph.lint()
    gm.recompile()
    return result


def count(gm: fx.GraphModule, target: Any) -> int:
    return sum(node.target is target for node in gm.graph.nodes)


def state(dtype: torch.dtype = FP32, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 5, N, C, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), torch.rand(batch, 5, N, generator=generator).requires_grad_()


def step(graph: Any, inputs: list[Any], grad: Tensor) -> list[Tensor]:
    """Output and gradients of everything that wants one."""
    (out,) = graph(*inputs)
    return [out, *torch.autograd.grad(out, [v for v in inputs if v.requires_grad], grad.to(out.dtype))]


# ------------------------------------------------------------------------------------------------ spellings
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", *HF])
def test_in_float32_the_numbers_are_the_same(name: str) -> None:
    module = norm(name)
    gm, inputs = capture(Lambda(mixed(module), norm=module), *state())
    before = copy_graph(gm)
    assert folded(gm).changed == 1
    assert count(gm, ops.pre_norm.overload) == 1
    assert count(gm, ops.pre.overload) == 0
    assert [node.target for node in gm.graph.nodes if node.op.startswith("call")] == [
        ops.pre_norm.overload,
        operator.getitem,
    ]
    grad = torch.randn(3, 5, C)
    for got, want in zip(step(gm, inputs, grad), step(before, inputs, grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 * float(want.detach().abs().max()))


@pytest.mark.parametrize("name", [name for name in ["LayerNorm", "RMSNorm", *HF] if name not in ONLY_FLOAT32])
def test_in_bf16_it_is_as_near_to_float64(name: str) -> None:
    module = norm(name).to(BF16)
    gm, inputs = capture(Lambda(mixed(module), norm=module), *state(BF16))
    before = copy_graph(gm)
    assert folded(gm).changed == 1
    grad = torch.randn(3, 5, C)
    twin = norm(name).to(BF16).double()
    wide = [value.detach().double().requires_grad_() for value in state(BF16)]
    reference, doubles = capture(Lambda(mixed(twin), norm=twin), *wide)
    for node in reference.graph.nodes:  # what is spelled as float32 is float64 here
        node.args = tuple(torch.float64 if arg is FP32 else arg for arg in node.args)
        node.kwargs = {key: torch.float64 if arg is FP32 else arg for key, arg in node.kwargs.items()}
        node.target = "double" if node.target == "float" else node.target
    reference.recompile()
    rows = [step(graph, given, grad) for graph, given in ((gm, inputs), (before, inputs), (reference, doubles))]
    torch.testing.assert_close(rows[0][0], rows[1][0], rtol=torch.finfo(BF16).eps, atol=0.0)
    for got, want, exact in zip(*rows, strict=True):
        assert got.dtype == want.dtype
        mine, theirs = (float((value.detach().double() - exact).square().mean().sqrt()) for value in (got, want))
        assert mine <= 1.05 * theirs + 1e-9


def test_a_norm_in_bf16_is_left() -> None:
    module = norm("ImageGPTLayerNorm").to(BF16)
    assert "no norm that is known begins there" in left(lambda u: module(u), BF16, norm=module)


def test_a_weight_that_is_rounded_stays_outside() -> None:
    """``gamma + 1`` in bf16: the norm itself is folded, its product with that is not."""
    module = norm("MoonshineStreamingLayerNorm").to(BF16)
    gm, inputs = capture(Lambda(mixed(module), norm=module), *state(BF16))
    before = copy_graph(gm)
    assert folded(gm).changed == 1
    (node,) = [node for node in gm.graph.nodes if node.target is ops.pre_norm.overload]
    assert node.args[2:] == (None, None, "layer", 1e-5, 0.0, False, False)
    torch.testing.assert_close(gm(*inputs), before(*inputs), rtol=2 * torch.finfo(BF16).eps, atol=0.0)


def test_an_open_batch_and_an_eps_that_is_an_input() -> None:
    def spelled(self: Any, x: Tensor, h: Tensor, eps: float) -> Tensor:
        u = torch.ops.mhc.pre.default(x, h)
        return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + eps)

    captured: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        captured.append(copy_graph(gm))
        result = folded(captured[-1])  # while guards are written down
        assert result.changed == 1, result.notes
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(Lambda(spelled), backend=keep, fullgraph=True)
    for index, eps in enumerate((1e-6, 2e-6, 4e-6)):
        compiled(*state(batch=3 + index), eps)
        (node,) = [node for node in captured[-1].graph.nodes if node.target is ops.pre_norm.overload]
        assert node.args[2:] == (None, None, "rms", eps, 0.0, False, False)
    assert len(captured) == 3  # another eps compiles again
    batch = captured[-1].graph.find_nodes(op="output")[0].args[0][0].meta["example_value"].shape[0]
    assert isinstance(batch, torch.SymInt)


# ------------------------------------------------------------------------------------------------ what is left
def left(branch: Callable[[Tensor], Any], dtype: torch.dtype = FP32, **parts: nn.Module) -> str:
    gm, _ = capture(Lambda(mixed(branch), **parts), *state(dtype))
    names = [node.name for node in gm.graph.nodes]
    result = folded(gm)
    assert result.changed == 0
    assert [node.name for node in gm.graph.nodes] == names
    (note,) = result.notes
    assert note.startswith("1 x left: ")
    assert "(first at " in note
    return note


def test_two_norms_read_it() -> None:
    a, b = norm("LayerNorm"), norm("RMSNorm")
    assert "read next to the norm as well (by layer_norm)" in left(lambda u: a(u) * b(u), a=a, b=b)


def test_wider_result() -> None:
    module = norm("LlamaRMSNorm")  # float32 weights on a bf16 stream
    assert "the norm's result is float32, its input bfloat16" in left(lambda u: module(u), BF16, norm=module)


def test_no_norm() -> None:
    linear = nn.Linear(C, C)
    assert "read by linear" in left(lambda u: linear(u), linear=linear)


def test_a_region_that_begins_in_between() -> None:
    module = norm("LayerNorm")

    def autocast(u: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(u)

    def frozen(u: Tensor) -> Tensor:
        with torch.no_grad():
            return module(u)

    for branch in (autocast, frozen):
        assert "a region of autocast or of another grad mode" in left(branch, norm=module)


def test_a_region_around_both_or_elsewhere_is_none_in_between() -> None:
    module = norm("LayerNorm")

    def forward(self: Any, x: Tensor, h: Tensor) -> Tensor:
        u = torch.ops.mhc.pre.default(x, h)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):  # as rotary embeddings are computed
            other = h.sum(-1, keepdim=True).cos()
        return module(u) * other

    gm, _ = capture(Lambda(forward, norm=module), *state())
    assert folded(gm).changed == 1


def test_float64() -> None:
    module = norm("LayerNorm").double()
    assert "its dtype is float64" in left(lambda u: module(u), torch.float64, norm=module)


def test_the_tags_are_those_of_the_pre() -> None:
    """Of a plan, of the user's checkpoint, or none; the norm's own are dropped with it."""
    module = norm("LlamaRMSNorm")
    original, _ = capture(Lambda(mixed(module), norm=module), *state())
    theirs = {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 1}
    keep, replay = {"recompute": CheckpointPolicy.MUST_SAVE}, {"recompute": CheckpointPolicy.MUST_RECOMPUTE}
    for pre, rest in [(theirs, theirs), (replay, replay), (keep, {}), (replay, theirs), ({}, theirs), (theirs, {})]:
        gm = copy_graph(original)
        for node in gm.graph.nodes:
            if node.op.startswith("call"):
                node.meta.update(pre if node.target is ops.pre.overload else rest)
        gm.meta[PLAN_KEY] = before = plan_key(gm)
        assert folded(gm).changed == 1
        for node in gm.graph.nodes:
            if node.op.startswith("call"):
                assert {key: node.meta[key] for key in ("recompute", "ac_graph_id") if key in node.meta} == pre
        assert gm.meta[PLAN_KEY] == plan_key(gm) != before


def test_where_no_kernel_runs_it() -> None:
    module = norm("LayerNorm")
    gm, _ = capture(Lambda(mixed(module), norm=module), *state())
    ctx = PassContext(Options())
    on_cpu = fold_norms(gm, ctx)
    assert (on_cpu.changed, len(on_cpu.notes)) == (0, 1)
    assert "on cpu there is no kernel" in on_cpu.notes[0]
    assert "too wide" in fold(gm, ctx, lambda named: "too wide" if named["weight"] is not None else "").notes[0]
    assert "lowering='native'" in folded(gm, lowering="native").notes[0]
    off = folded(gm, fuse=False)
    assert (off.changed, off.notes) == (0, [])
    assert folded(gm).changed == 1
    again = folded(gm)
    assert (again.changed, again.notes) == (0, [])


# ------------------------------------------------------------------------------------------------ whole models
def hugging_face(family: str) -> tuple[nn.Module, int]:
    """(a model of two layers, its sites whose branch begins with a norm)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 41, "max_position_embeddings": 32,
             "pad_token_id": 0}  # fmt: skip
    if family == "gpt2":
        small = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 32, "vocab_size": 41}
    if family == "gemma3_text":
        small |= {"sliding_window": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **small, use_cache=False))
    return model.eval(), 2 if family == "cohere" else 4


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "cohere"])
@pytest.mark.usefixtures("everywhere")
def test_every_site_of_a_model(family: str, dtype: torch.dtype) -> None:
    model, sites = hugging_face(family)
    ids = torch.arange(12).reshape(2, 6)
    _, inputs, (on, off) = conversions(model.to(dtype), [ids], [{}, {"fuse": False}])
    assert isinstance(on, Conversion)
    assert isinstance(off, Conversion)
    result = on.report.passes[-2]
    assert (result.name, result.changed, result.notes) == ("fold_norms", sites, [])
    assert len(on.report.sites) == sites
    assert off.report.passes[-2].changed == 0
    for conversion in (on, off):
        randomise(conversion)
    wanted = [v for v in inputs if isinstance(v, nn.Parameter)]
    rows = [run(each.gm, [*inputs, *each.parameters.values], wanted) for each in (on, off)]
    tolerance = 1e-5 if dtype is FP32 else 2e-2
    for got, want in zip(rows[0][0] + rows[0][1], rows[1][0] + rows[1][1], strict=True):
        assert (got is None) == (want is None)
        if got is not None:
            scale = float(want.abs().max()) + 1e-6
            assert float((got - want).abs().max()) <= tolerance * scale


def checkpointed(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def checkpointed_branches(layer: nn.Module, x: Tensor) -> Tensor:
    x = x + checkpoint(layer.attn, x, use_reentrant=False)
    return x + checkpoint(layer.mlp, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("variant", "body"),
    [("mhc", None), ("mhc", checkpointed), ("mhc", checkpointed_branches), ("single_pass", None)],
)
@pytest.mark.usefixtures("everywhere")
def test_compiled_with_gradients(variant: str, body: Any) -> None:
    """One training step through AOTAutograd and its partitioner: folded or not it gives the same numbers, and with a
    plan the same bits as without."""
    from mhc_compile.backend import reports

    rows = []
    two_states = 2 * 2 * 5 * 4 * WIDTH * 4  # bytes
    for fuse, recompute in ((False, "off"), (True, "off"), (True, two_states)):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = Stack([Block() for _ in range(3)], body)
        options = {"compiler": "aot_eager", "fuse": fuse, "recompute": recompute, "variant": variant}
        out = torch.compile(model, backend="mhc", options=options)(tokens())
        out.square().mean().backward()
        rows.append([out.detach(), *(p.grad for _, p in sorted(model.named_parameters()))])
        result, plan = reports[-1].passes[-2:]
        assert result.changed == (6 if fuse else 0), result.notes
        assert bool(plan.changed) == (recompute != "off"), plan.notes
    for want, got, planned in zip(*rows, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
        assert torch.equal(got, planned)


@pytest.mark.parametrize(("variant", "kept"), [("mhc", 0), ("single_pass", 4)])
@pytest.mark.usefixtures("everywhere")
def test_the_branch_input_is_kept_where_the_gate_is_known_first(variant: str, kept: int) -> None:
    """In single_pass a site mixes with the gate of the one before. The first has none, but the end has one, with the
    model's last norm behind it."""
    model = Stack([Block() for _ in range(2)])
    _, _, (outcome,) = conversions(model, [tokens()], [{"variant": variant}])
    assert isinstance(outcome, Conversion)
    nodes = [node for node in outcome.gm.graph.nodes if node.target is ops.pre_norm.overload]
    assert (len(nodes), sum(node.args[8] for node in nodes)) == (4, kept)


@pytest.mark.usefixtures("everywhere")
def test_branches_without_a_norm_of_their_own_are_noted() -> None:
    model = Lambda(
        lambda self, x: (lambda y: y + self.b(y))(x + self.a(x)), a=Attention(norm=None), b=Mlp(norm=nn.LayerNorm)
    )
    _, _, (outcome,) = conversions(model, [tokens(2, 5, WIDTH)], [{}])
    assert isinstance(outcome, Conversion)
    result = outcome.report.passes[-2]
    assert result.changed == 1
    assert "1 x left: no norm that is known begins there (it is read by linear" in result.notes[0]
