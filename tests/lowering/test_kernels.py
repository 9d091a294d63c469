"""Which node a kernel takes, why it does not, and that every kernel's op opens into launches."""

from __future__ import annotations

import pytest
import torch

from mhc_compile.config import Options
from mhc_compile.lowering import kernels
from mhc_compile.lowering.base import LoweringLog
from tests.lowering.graphs import chain, gradients, inputs, lowered
from tests.lowering.hopper import compiler_missing

CUDA = torch.device("cuda", 0)


def test_platforms() -> None:
    assert "cpu" in kernels.platform_refusal(torch.device("cpu")) or kernels.interpreted()
    assert kernels.platform_refusal(torch.device("meta"))
    assert kernels.platform_refusal(None)


def test_a_device_that_kernels_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "triton_version", lambda: "3.6.0")
    monkeypatch.setattr(kernels, "_capability", lambda index: (8, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert kernels.platform_refusal(CUDA) == ""
    monkeypatch.setattr(kernels, "_capability", lambda index: (7, 5))
    assert kernels.platform_refusal(CUDA) == "compute capability (7, 5) is below 8.0"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert kernels.platform_refusal(CUDA) == "kernels are not tested on ROCm"


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native bodies compile, and the log says why."""
    monkeypatch.setattr(kernels, "triton_version", lambda: "")
    assert kernels.platform_refusal(CUDA) == "Triton is not installed"
    assert kernels.refusal("pre", {}) == "Triton is not installed"
    kernels.register_kernels(CUDA)
    log = LoweringLog()
    gradients(lowered(chain, Options(), log, []), inputs(3))
    assert {entry.provider for entry in log.entries} == {"inductor"}
    assert {entry.reason for entry in log.entries if entry.op == "pre"} == {"Triton is not installed"}


def test_copies_are_left_to_inductor() -> None:
    assert "inductor" in kernels.refusal("expand", {})
    assert "inductor" in kernels.refusal("collapse_backward", {})


@pytest.mark.skipif(compiler_missing(), reason="needs Triton, not its interpreter")
@pytest.mark.parametrize("tokens", [8192, 1, 0, "any"])
def test_every_op_opens_into_launches(tokens: int | str) -> None:
    """With no opaque call left for inductor, for a known number of tokens and for a symbol that stays one."""
    from tests.lowering.opened import fake_calls, launches, opened, some_tokens

    mode, count = some_tokens(tokens == "any", tokens if isinstance(tokens, int) else 8192)
    for name, calls in fake_calls(count, 64, mode).items():
        for arguments in calls:
            graph, reasons = opened(name, arguments, mode)
            assert reasons == [], name
            assert len(launches(graph)) == (0 if tokens == 0 else 1), name
            assert not any(str(node.target).startswith("mhc_kernel.") for node in graph.nodes), name
    # torch asks whether a buffer has more than one row, which is a guard on few tokens; no number of them is taken.
    assert mode.shape_env.replacements == {}


def test_how_many_sites_a_call_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan of recompute asks: one where there is no kernel, or none for several sites."""
    from mhc_compile.lowering import replay

    state = torch.empty(1, 4, 4096, dtype=torch.bfloat16)
    assert kernels.sites_a_replay(state) == 1, "on a CPU"
    monkeypatch.setattr(kernels, "platform_refusal", lambda device: "")
    assert kernels.sites_a_replay(state) == replay.MOST
    assert kernels.sites_a_replay(state.float()) == 1, "a row does not fit the registers"
