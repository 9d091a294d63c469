"""Recompute is not to be seen in the numbers: outputs and gradients with and without it are the same bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mhc_compile.backend as backend
from mhc_compile import ops
from tests.passes.models import Block, Stack, tokens
from tests.passes.planned import STATE, Run, SpelledNorm, kept_of, model, plan_of, same


@pytest.mark.parametrize(
    ("variant", "norm"),
    [("mhc", nn.LayerNorm), ("mhc", nn.RMSNorm), ("single_pass", SpelledNorm), ("identity", SpelledNorm)],
)
def test_bits(variant: str, norm: type[nn.Module]) -> None:
    off = Run(model(3, norm), variant=variant, init="paper")
    run = Run(model(3, norm), variant=variant, init="paper", recompute="memory")
    assert run.result.changed > 0
    assert len(run.saved) <= len(off.saved)
    same(off, run)


def test_bits_with_a_learned_collapse_and_dropout() -> None:
    class Dropping(Block):
        def forward(self, x: Tensor) -> Tensor:
            x = x + nn.functional.dropout(self.attn(x), 0.3)
            return x + nn.functional.dropout(self.mlp(x), 0.3)

    def build() -> nn.Module:
        torch.manual_seed(3)
        return Stack([Dropping(norm=SpelledNorm) for _ in range(3)])

    off, run = Run(build(), collapse="learned"), Run(build(), collapse="learned", recompute=2 * STATE)
    assert run.result.rows[-1].output_bytes == 0  # the state that the head reads has no branch
    same(off, run)


def test_checkpoints_of_the_model_keep_their_branches_and_lose_the_streams() -> None:
    """Inside the user's checkpoints the branches are recomputed as asked; states and outputs follow the plan."""

    def body(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    plain, off = Run(model(4)), Run(model(4, body=body))
    run = Run(model(4, body=body), recompute=3 * STATE)
    kept = kept_of(run.result)
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept]
    assert len(kept) < 7
    assert run.count(ops.coefficients.overload) == 0
    assert off.count(ops.coefficients.overload) > 0  # without a plan the checkpoints run them again
    more = run.count(torch.ops.aten.addmm.default) + run.count(torch.ops.aten.mm.default)
    assert more > plain.count(torch.ops.aten.addmm.default) + plain.count(torch.ops.aten.mm.default)
    same(off, run)


def test_activation_memory_budget_leaves_the_plan_alone() -> None:
    import torch._functorch.config as functorch_config

    off = Run(model(3))
    with functorch_config.patch(activation_memory_budget=0.5):
        run = Run(model(3), recompute=3 * STATE)
    assert run.saved_of(ops.post.overload) == [index - 1 for index in kept_of(run.result)]
    same(off, run)


# ------------------------------------------------------------------------------------------------ through a compiler
def step(build: Callable[[], nn.Module], inputs: dict[str, Tensor], **options: Any) -> list[Tensor | None]:
    """Output and gradients of one training step behind the backend."""
    torch._dynamo.reset()
    module = build()
    compiled = torch.compile(module, backend=backend.mhc, options={"init": "paper", **options})
    torch.manual_seed(5)
    output = compiled(**inputs)
    output = getattr(output, "last_hidden_state", output)
    (output.float() * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), *(parameter.grad for parameter in module.parameters())]


def assert_same_bits(off: list[Tensor | None], run: list[Tensor | None]) -> None:
    assert plan_of(backend.reports[-1]).changed > 0
    assert len(off) == len(run)
    for one, other in zip(off, run, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_bits_with_inductor(dtype: torch.dtype) -> None:
    inputs = {"x": tokens(dtype=dtype)}
    rows = [step(lambda: model(2).to(dtype), inputs, recompute=r) for r in ("off", 2 * STATE * dtype.itemsize // 4)]
    assert_same_bits(*rows)


def qwen3(dtype: torch.dtype, checkpoints: bool) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    torch.manual_seed(3)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2, head_dim=16,
        num_hidden_layers=3, vocab_size=41, use_cache=False,
    )  # fmt: skip
    module = Qwen3Model(config).to(dtype).train()
    if checkpoints:
        module.gradient_checkpointing_enable()
    return module


@pytest.mark.parametrize(
    ("compiler", "dtype", "checkpoints"),
    [
        ("aot_eager", torch.float32, True),
        ("aot_eager", torch.bfloat16, False),
        pytest.param("inductor", torch.float32, True, marks=pytest.mark.slow),
        pytest.param("inductor", torch.bfloat16, False, marks=pytest.mark.slow),
        pytest.param("inductor", torch.bfloat16, True, marks=pytest.mark.slow),
    ],
)
def test_bits_of_hugging_face(compiler: str, dtype: torch.dtype, checkpoints: bool) -> None:
    """With ``gradient_checkpointing_enable`` and without: six states, of which one and the source of the first are
    kept; the five others and all six branch inputs are replayed."""
    pytest.importorskip("transformers")
    inputs = {"input_ids": torch.arange(16).reshape(2, 8)}
    wanted = ("off", 2 * (2 * 8 * 4 * 32 * dtype.itemsize))  # two states
    rows = [step(lambda: qwen3(dtype, checkpoints), inputs, compiler=compiler, recompute=bound) for bound in wanted]
    assert_same_bits(*rows)
    result = plan_of(backend.reports[-1])
    assert result.changed == 11
    assert [row.state for row in result.rows] == ["from source", "kept", *["replayed"] * 4]


@pytest.mark.slow
def test_bits_of_a_native_model() -> None:
    """Hyper-connections that the model brought along, raised and then planned like any others."""
    pytest.importorskip("transformers")
    from tests.spellings.families import deepseek_v4

    inputs = {"input_ids": torch.arange(16).reshape(2, 8)}
    options = {"compiler": "aot_eager", "rewrite": False}
    rows = [step(lambda: deepseek_v4(2), inputs, **options, recompute=r) for r in ("off", 3 * 2 * 8 * 4 * 32 * 4)]
    assert_same_bits(*rows)
    result = plan_of(backend.reports[-1])
    assert [row.state for row in result.rows].count("kept") == 2
    assert len(result.rows) == 5  # four sites and the head
