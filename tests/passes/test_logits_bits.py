"""Coefficients that are made again are not to be seen in the numbers, through inductor: outputs and gradients are the
same bits with them kept, with the logits alone, and with nothing replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mhc_compile.backend as backend
from mhc_compile.passes import logits
from tests.passes.models import tokens
from tests.passes.planned import STATE, model, plan_of
from tests.passes.test_recompute_bits import qwen3, step

pytestmark = pytest.mark.slow


def compare(
    build: Callable[[], nn.Module], inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any
) -> None:
    """Without a plan, and with each of the two forms."""
    bound = options.pop("bound")
    off = step(build, inputs, **options)
    for form in logits.FORMS:
        monkeypatch.setattr(logits, "FORMS", (form,))
        run = step(build, inputs, recompute=bound, **options)
        report = backend.reports[-1]
        plan = plan_of(report)
        assert plan.changed > 0
        assert plan.logits.chosen == (form == "logits"), plan.logits.refusal
        sites = sum(row.output_bytes > 0 for row in plan.rows)  # not the head
        assert report.log.counts()["activate", "inductor"] == (sites if form == "logits" else 0)
        assert len(off) == len(run)
        for one, other in zip(off, run, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        monkeypatch.undo()


@pytest.fixture(autouse=True)
def _no_caches() -> Any:
    """What is lowered is to be seen in the log."""
    from torch._inductor import config

    with config.patch(force_disable_caches=True):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["mhc", "single_pass"])
def test_bits(variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 2 * STATE * dtype.itemsize // 4
    compare(lambda: model(2).to(dtype), {"x": tokens(dtype=dtype)}, monkeypatch, variant=variant, bound=bound)


def test_bits_with_a_learned_collapse(monkeypatch: pytest.MonkeyPatch) -> None:
    compare(lambda: model(2), {"x": tokens()}, monkeypatch, collapse="learned", bound=2 * STATE)


@pytest.mark.parametrize("checkpoints", [False, True])
def test_bits_of_hugging_face(checkpoints: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    inputs = {"input_ids": torch.arange(16).reshape(2, 8)}
    dtype = torch.bfloat16 if checkpoints else torch.float32
    bound = 2 * (2 * 8 * 4 * 32 * dtype.itemsize)
    compare(lambda: qwen3(dtype, checkpoints), inputs, monkeypatch, bound=bound)


def test_bits_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """One artefact with a symbolic number of tokens."""

    def run(form: str) -> list[Tensor]:
        monkeypatch.setattr(logits, "FORMS", (form,))
        torch._dynamo.reset()
        module, found = model(2), []
        compiled = torch.compile(
            module, backend=backend.mhc, options={"init": "paper", "recompute": 2 * STATE}, dynamic=True
        )
        for count in (5, 9):
            output = compiled(tokens(2, count, 3))
            (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
            found.append(output.detach())
        assert plan_of(backend.reports[-1]).logits.chosen == (form == "logits")
        return [*found, *(parameter.grad for parameter in module.parameters())]

    for both, alone in zip(*map(run, logits.FORMS), strict=True):
        assert torch.equal(both, alone)


def test_the_two_share_no_artefact(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """With inductor's caches on: the plan's tags are no part of torch's keys, and of ours they are."""
    from torch._inductor import config
    from torch._inductor.utils import clear_caches, fresh_cache

    seen: list[list[int]] = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen[-1][0] += func is torch.ops.mhc_native.activate.default
            return func(*args, **(kwargs or {}))

    with config.patch(force_disable_caches=False), fresh_cache():
        for form in ("coefficients", "logits", "coefficients", "logits"):
            monkeypatch.setattr(logits, "FORMS", (form,))
            clear_caches()
            seen.append([0])
            torch._dynamo.reset()
            compiled = torch.compile(model(2), backend=backend.mhc, options={"init": "paper", "recompute": 2 * STATE})
            output = compiled(tokens())
            with Count():
                output.sum().backward()
    assert [count for (count,) in seen] == [0, 4, 0, 4]
