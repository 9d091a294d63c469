"""Helpers of the Triton launchers: where kernels can run, views by token, sizes.

This module imports Triton; nothing of the package imports it before a kernel is wanted.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mhc_compile.compat import size_hint

from . import tune

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported): on CPU tensors, in tests."""

_UPCAST: tl.constexpr = tl.constexpr(INTERPRETED)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
STREAMS = (1, 2, 3, 4, 8)


KERNEL_OPS: dict[Any, Callable[..., Any]] = {}
"""Overload of each `mhc_kernel::` op -> the plain function that launches its kernels."""

_traced: contextvars.ContextVar[bool] = contextvars.ContextVar("mhc_traced_launch", default=False)


def kernel_op(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Any]:
    """Register a launcher as the custom op `mhc_kernel::<name>` and remember the plain function for `inlined`."""

    def register(function: Callable[..., Any]) -> Any:
        definition = torch.library.custom_op(f"mhc_kernel::{name}", function, mutates_args=(), schema=schema)
        KERNEL_OPS[getattr(torch.ops.mhc_kernel, name).default] = function
        return definition

    return register


@contextlib.contextmanager
def traced_launches() -> Iterator[None]:
    """Within it, `launch` leaves a node for inductor (which launches the kernel from its own wrapper) and runs
    nothing."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


def launch(kernel: Any, grid: tuple[Any, ...], *args: Any, **constants: Any) -> None:
    """Launch `kernel`; runtime arguments by position, compile-time constants and num_warps, num_stages by name."""
    if _traced.get():
        torch.library.wrap_triton(kernel)[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


def launch_tuned(
    kernel: Any,
    grid: Callable[[Any, tune.Config], tuple[Any, ...]],
    *args: Any,
    config: tune.Config,
    others: Callable[[], Sequence[tune.Config]],
    **constants: Any,
) -> None:
    """Launch `kernel` with its fixed setting, or with the one of `others` that is faster on this device (see `tune`).

    Args:
        grid: (tokens, setting) -> the grid.
        args: runtime arguments, the first a tensor [T, ...].
        config, others: the fixed setting and those to compare it with: constants and num_warps, num_stages.
        constants: compile-time constants that no setting changes.
    """

    def start(tokens: int, values: Sequence[Any], given: tune.Config) -> None:
        kernel[grid(tokens, given)](*values, **constants, **given)

    chosen = tune.setting(kernel, args, constants, config, others, start)
    launch(kernel, grid(args[0].shape[0], chosen), *args, **constants, **chosen)


def state_refusal(streams: Tensor, *others: Tensor | None) -> str:
    """Why no kernel takes a state [..., n, C] with the tensors beside it; empty if one does."""
    for value in (streams, *others):
        if value is not None and value.dtype not in FLOATS:
            return f"dtype {value.dtype}"
    if streams.shape[-2] not in STREAMS:
        return f"{streams.shape[-2]} streams, kernels exist for {STREAMS}"
    if not isinstance(streams.shape[-1], int):
        return "symbolic hidden size"
    return ""


def hint(size: Any, default: int = 8192) -> int:
    """A size to choose a configuration by; for a symbolic size its example, without a guard on it."""
    return size_hint(size, default)


def nonempty(size: Any) -> bool:
    """False for 0; a symbolic size is taken as positive (torch specialises 0 and 1)."""
    return not isinstance(size, int) or size > 0


def tokens_of(streams: Tensor) -> int:
    """Number of tokens of a state [..., n, C]."""
    return math.prod(streams.shape[:-2])


def by_token(value: Tensor, trailing: int) -> Tensor:
    """[..., d1 .. dk] -> contiguous [T, d1 .. dk] with `trailing` = k; no copy for contiguous input."""
    tail = value.shape[value.dim() - trailing :]
    return value.contiguous().reshape(math.prod(value.shape[: value.dim() - trailing]), *tail)


def block_of(width: int, most: int) -> int:
    """Block of channels: the least power of two >= width, at most `most`, at least 16."""
    return max(16, min(most, triton.next_power_of_2(width)))


def is_row(grad: Tensor, streams: Tensor) -> bool:
    """Whether a gradient of a state [..., n, C] is one row [..., C] for all streams."""
    return grad.dim() == streams.dim() - 1


def chunk_of(width: int, candidates: tuple[int, ...] = (1024, 512)) -> int:
    """The largest candidate that divides the width, else the one that wastes the fewest masked lanes."""
    for candidate in candidates:
        if width % candidate == 0:
            return candidate
    return min((block_of(width, candidate) for candidate in candidates), key=lambda block: -width % block)


@triton.jit
def load_raw(pointer, start, offsets, mask, MASKED: tl.constexpr) -> tl.tensor:
    """One row of channels in its own dtype; unmasked where the block divides the width, so that loads stay 16 bytes
    wide."""
    if MASKED:
        value = tl.load(pointer + start + offsets, mask=mask, other=0.0)
    else:
        value = tl.load(pointer + start + offsets)
    return value


@triton.jit
def load_streams(pointer, token, offsets, mask, C: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """One block of channels of the N streams of a token, in their own dtype."""
    rows = ()
    for i in tl.static_range(N):
        rows = rows + (load_raw(pointer, (token * N + i) * C, offsets, mask, MASKED),)
    return rows


@triton.jit
def token_block(C: tl.constexpr, BC: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """(token, channels [BC]) of a program that has one block of channels of one token."""
    BLOCKS: tl.constexpr = (C + BC - 1) // BC
    program = tl.program_id(0)
    return (program // BLOCKS).to(tl.int64), (program % BLOCKS) * BC + tl.arange(0, BC)


@triton.jit
def wide_streams(pointer, token, offsets, mask, C: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr) -> tl.tensor:
    """`load_streams` as float32."""
    rows = ()
    for i in tl.static_range(N):
        rows = rows + (load_row(pointer, (token * N + i) * C, offsets, mask, MASKED),)
    return rows


@triton.jit
def stream_start(token, i: tl.constexpr, C: tl.constexpr, N: tl.constexpr, ALIKE: tl.constexpr) -> tl.tensor:
    """Where stream i of a token begins; ALIKE: one row of memory stands for all N."""
    return token * C if ALIKE else (token * N + i) * C


@triton.jit
def load_row(pointer, start, offsets, mask, MASKED: tl.constexpr) -> tl.tensor:
    """One row of channels as float32."""
    return load_raw(pointer, start, offsets, mask, MASKED).to(tl.float32)


@triton.jit
def store_row(pointer, start, offsets, value, mask, MASKED: tl.constexpr) -> None:
    """Store a row, rounded to the dtype of the pointer."""
    if MASKED:
        tl.store(pointer + start + offsets, value.to(pointer.dtype.element_ty), mask=mask)
    else:
        tl.store(pointer + start + offsets, value.to(pointer.dtype.element_ty))


@triton.jit
def site_row(
    xs, y, q, h, o: tl.constexpr, N: tl.constexpr, HAS_RES: tl.constexpr, TRANSPOSE: tl.constexpr
) -> tl.tensor:
    """q_o y + sum_i H[o, i] X_i of one block, in float32: a stream behind a site.

    The fused multiply-adds are spelled out: left to the compiler, which product is fused differs from kernel to kernel,
    and a state that is rebuilt would differ in its last bit from the one that was first made.
    """
    total = q[o] * y
    if HAS_RES:
        for i in tl.static_range(N):
            total = tl.fma(tl.broadcast_to(h[i * N + o if TRANSPOSE else o * N + i], y.shape), xs[i], total)
    else:
        total = tl.fma(tl.broadcast_to(q[o], y.shape), y, xs[o])
    return total


@triton.jit
def dot(a, b, total) -> tl.tensor:
    """a @ b + total, exact products for float32; the interpreter holds bf16 as raw bits and must be given float32."""
    if _UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def load_scalars(pointer, COUNT: tl.constexpr) -> tl.tensor:
    """COUNT consecutive float32 scalars as a tuple, loaded before any loop so that no store can hold them back."""
    values = ()
    for index in tl.static_range(COUNT):
        values = values + (tl.load(pointer + index).to(tl.float32),)
    return values


@triton.jit
def side_by_side(values) -> tl.tensor:
    """2^m rows [B] -> [B, 2, .., 2] (m twos), row k where the m indices are the bits of k from the lowest, so that one
    reduction over B serves them all: a reduction across warps costs a barrier, whatever it carries."""
    for _ in tl.static_range(6):
        if len(values) > 1:
            pairs = ()
            for k in tl.static_range(len(values) // 2):
                pairs = pairs + (tl.join(values[2 * k], values[2 * k + 1]),)
            values = pairs
    return values[0]


@triton.jit
def places(COUNT: tl.constexpr) -> tl.tensor:
    """The number of each row in `side_by_side` of COUNT rows, [2, .., 2] (a number for one row)."""
    numbers = ()
    for k in tl.static_range(COUNT):
        numbers = numbers + (tl.full((1,), k, dtype=tl.int32),)
    return tl.sum(side_by_side(numbers), axis=0)


@triton.jit
def zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """COUNT rows [BLOCK] of zeros, as a tuple."""
    rows = ()
    for _ in tl.static_range(COUNT):
        rows = rows + (tl.zeros((BLOCK,), dtype=tl.float32),)
    return rows
