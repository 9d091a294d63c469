"""Every kernel compiled for sm_90 as it is launched: registers and spills. That none is atomic: see hopper.py."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import Resources, atomics, compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton's compiler")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

REGISTERS = {
    "post": (72, 40),
    "post_collapse": (40, 40),
    "post_dots": (112, 40, 56),
    "pre": (40,),
    "pre_dots": (56,),
    "pre_norm": (40, 40),
    "pre_norm_dots": (255, 128),
    "post_pre_norm": (48, 48),
    "project": (168,),
    "activate": (48,),
    "activate_again": (48,),
    "activate_beside_norm": (64, 64),
    "activate_post": (80,),
    "activate_pre": (32,),
    "activate_pre_norm": (64, 64, 48),
    "gate_pre_norm": (64, 64),
    "post_project": (80,),
    "logits_backward": (248, 255),
    "logits_backward_early": (248,),
    "logits_backward_rest": (40,),
    "streams_backward": (255, 176, 255),
    "replay": (88,),
    "replay_normed": (128, 128),
    "sinkhorn": (24,),
    "sinkhorn_backward": (232,),
    "site_boundary": (232, 255, 200),
}
"""Op -> most registers of each of its calls in `calls`, four streams of 4096 channels in bf16: what Triton 3.6 takes,
rounded up to what registers are dealt out in, by 8 for a thread. 168 are the most with which three programs of four
warps share a multiprocessor, 128 with which four do."""

NARROW = {
    "pre_norm": (48, 48),
    "pre_norm_dots": (168, 80),
    "post_pre_norm": (56, 56),
    "replay_normed": (128, 128),
    "streams_backward": (255, 168, 248),
    "site_boundary": (240, 248, 208),
}
"""The same with 2560 channels, where they differ."""

TRIFLE = 16
"""Bytes: a number or two that are put aside and taken back once, so that one more program fits."""

SPILLS = {
    # Eight streams have 64 numbers of H a token, and a thread has two tokens. phi's tile is shared by 64 tokens:
    # smaller ones spill less a thread and read phi the more often, from the L2. Not measured which is faster.
    ("streams_backward", 8, BF16): 1512,
    ("streams_backward", 8, FP16): 1552,
    # 64 sums and both states of eight channels a thread; the streams are in 16 bits wherever speed is asked for.
    ("post_dots", 8, FP32): 304,
}
"""(Op, streams, dtype) -> most bytes that a thread spills; else `TRIFLE`. Bounds of what there is, to be lowered."""


def resources(name: str, width: int = 4096, tokens: int = 8192, **changes: object) -> list[Resources]:
    """The kernel of each call of an op."""
    from tests.lowering.opened import compiled, fake_calls, launches, opened, some_tokens

    mode, count = some_tokens(dynamic=False, example=tokens)
    graphs = [opened(name, call, mode)[0] for call in fake_calls(count, width, mode, **changes)[name]]
    return [compiled(launch) for graph in graphs for launch in launches(graph)]


def check(name: str, width: int, bounds: tuple[int, ...]) -> None:
    made = resources(name, width)
    assert len(made) == len(bounds)
    assert [one.stack for one in made] == [0] * len(made)
    assert all(one.registers <= bound for one, bound in zip(made, bounds, strict=True)), [one.registers for one in made]


def test_every_kernel_has_its_row() -> None:
    from tests.lowering.calls import NAMES

    assert sorted(REGISTERS) == NAMES


@pytest.mark.parametrize("name", REGISTERS)
def test_registers(name: str) -> None:
    check(name, 4096, REGISTERS[name])


def test_atomics_are_seen() -> None:
    assert atomics("@%p1 red.global.gpu.relaxed.add.f32 [%rd1], %f1;") == ["red.global.gpu.relaxed.add.f32"]
    assert atomics("atom.shared.cas.b32 %r1, [%r2], %r3, %r4;") == ["atom.shared.cas.b32"]
    assert atomics("cp.async.cg.shared.global [%r1], [%rd1], 16; redux.sync.add.s32 %r1, %r2, %r3;") == []


@pytest.mark.parametrize("name", NARROW)
def test_registers_of_2560_channels(name: str) -> None:
    check(name, 2560, NARROW[name])


HEAVY = ("streams_backward", "pre_norm_dots", "post_dots")
"""What n and the dtype weigh on most."""


@pytest.mark.parametrize("name", HEAVY)
@pytest.mark.parametrize(("n", "dtype"), [(4, FP16), (4, FP32), (8, BF16), (8, FP32)])
def test_spills(name: str, n: int, dtype: torch.dtype) -> None:
    stacks = [one.stack for one in resources(name, n=n, dtype=dtype)]
    assert max(stacks) <= SPILLS.get((name, n, dtype), TRIFLE), stacks


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REGISTERS if name not in ("site_boundary", "replay_normed")])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_spills_of_every_kernel(name: str, n: int, dtype: torch.dtype) -> None:
    """`site_boundary` takes four streams in 16 bits alone; `replay_normed` what fits (test_replay_normed.py)."""
    test_spills(name, n, dtype)


@pytest.mark.slow
def test_spills_of_site_boundary_in_float16() -> None:
    test_spills("site_boundary", 4, FP16)


@pytest.mark.parametrize(("n", "most"), [(4, TRIFLE), (8, 320)])
def test_spills_of_few_tokens(n: int, most: int) -> None:
    """One row of tiles: what spills is in nobody's way for long."""
    assert resources("streams_backward", tokens=8, n=n)[0].stack <= most


@pytest.mark.parametrize(("n", "width"), [(4, 2560), (4, 4096), (8, 4096)])
def test_a_layer_norm_spills_nothing(n: int, width: int) -> None:
    assert [one.stack for one in resources("pre_norm_dots", width, n=n, norm="layer")] == [0, 0]


@pytest.mark.parametrize(("name", "most"), [("sinkhorn", 0), ("sinkhorn_backward", 320)])
def test_the_longest_sinkhorn(name: str, most: int) -> None:
    """Most divisors of 64 half steps fit the registers. The default, 40, spills nothing."""
    assert max(one.stack for one in resources(name, steps=64)) <= most


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logits_backward", "logits_backward_early"])
def test_the_longest_sinkhorn_within_the_logits(name: str) -> None:
    assert max(one.stack for one in resources(name, steps=64)) <= 352
