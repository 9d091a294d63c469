"""post that makes its own coefficients: H_res is consumed where Sinkhorn leaves it, and never written.

Where nothing but `post` reads the post gate and H_res of a site (no backward does), each program of `post` goes from
the partial projections of its token to both, with its first block of channels on its way meanwhile; the pre gate is
made by the norm that reads it (`gate_pre_norm`). A site takes three launches instead of four, and the branch does not
wait for Sinkhorn. Every program runs Sinkhorn for one token in all its warps, where `activate` has a warp for eight:
the more tokens, the more of that is not hidden behind memory, hence `MOST`.
Traffic, n = 4: that of `post`, 2n + 1 = 9 u, less the n^2 + n numbers a token that are neither written nor read.
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from mhc_compile.ops.coefficients import ATTRIBUTE_SCHEMA
from mhc_compile.ops.spec import CoefficientSpec

from . import gate_pre_norm
from .activate_pre import gate_scalars
from .base import VIEWS, LoweringLog, arguments, fake, readers, result
from .coefficients import activation_constants, gate, gate_logits, lengths, matrix_logits, spec_of
from .inline import insert_function, replace
from .launch import by_token, hint, kernel_op, launch, load_raw, load_streams, nonempty, site_row, store_row, tokens_of
from .post import post_config
from .sinkhorn import iterate

MOST = 512
"""Most tokens (by their example) for which `post` makes its own coefficients. On an H200 a site gains 1 to 3 us of 19
to 28 up to 512 tokens (`benchmarks.decode`) and loses 5 us of 44 at 1024, where the programs, a thousand instructions a
warp and 80 registers a thread, no longer fit the device at once."""
SHARED = 128
"""Up to so many tokens every block of channels has a program: a device has more multiprocessors than that."""


@triton.jit
def rounded(value, MIX: tl.constexpr) -> tl.tensor:
    """The value as it would come out of memory in the dtype that post and res are kept in."""
    if MIX == "bfloat16":
        value = value.to(tl.bfloat16)
    elif MIX == "float16":
        value = value.to(tl.float16)
    return value.to(tl.float32)


@triton.jit
def activate_post_kernel(
    partial_ptr, bias_ptr, alpha_post_ptr, alpha_res_ptr, x_ptr, y_ptr, out_ptr, tokens, TOTAL: tl.constexpr,
    SPLITS: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, POST: tl.constexpr,
    RES: tl.constexpr, NORM: tl.constexpr, NORM_EPS: tl.constexpr, SIGMOID: tl.constexpr, POST_SCALE: tl.constexpr,
    POST_EPS: tl.constexpr, SINKHORN: tl.constexpr, POSITIVITY: tl.constexpr, POSITIVE_EPS: tl.constexpr,
    ROW_FIRST: tl.constexpr, STEPS: tl.constexpr, EPS: tl.constexpr, CLAMP: tl.constexpr, MIX: tl.constexpr,
    C: tl.constexpr, BC: tl.constexpr, EACH: tl.constexpr, TRANSPOSE: tl.constexpr,
) -> None:  # fmt: skip
    """Program: EACH blocks of channels of one token, all streams."""
    PARTS: tl.constexpr = (C + BC * EACH - 1) // (BC * EACH)
    MASKED: tl.constexpr = C % (BC * EACH) != 0
    program = tl.program_id(0)
    token = (program // PARTS).to(tl.int64)
    lanes = (program % PARTS) * (BC * EACH) + tl.arange(0, BC)
    rows = load_streams(x_ptr, token, lanes, lanes < C, C, N, MASKED)
    branch = load_raw(y_ptr, token * C, lanes, lanes < C, MASKED)
    base = (token + tl.zeros((1,), dtype=tl.int64)) * KP
    there = base >= 0
    r = lengths(partial_ptr, base, there, tokens, TOTAL, SPLITS, 1, K, KP, NORM, NORM_EPS)
    _, gates = gate_logits(partial_ptr, bias_ptr, alpha_post_ptr, base, there, r, tokens, SPLITS, 1, N, NP, KP, POST)
    q = gate_scalars(rounded(gate(gates, SIGMOID, POST_SCALE, POST_EPS), MIX), N, NP)
    h = ()
    if RES >= 0:
        _, matrix, cells, valid = matrix_logits(partial_ptr, bias_ptr, alpha_res_ptr, base, there, r, tokens, SPLITS, 1,
                                                N, NP, KP, RES)  # fmt: skip
        if SINKHORN:
            matrix = iterate(matrix, valid, POSITIVITY, POSITIVE_EPS, ROW_FIRST, STEPS, EPS, CLAMP, N, NP)
        matrix = rounded(matrix, MIX)
        for i in tl.static_range(N * N):
            one = tl.where(valid & (cells == i), matrix, 0.0)
            h = h + (tl.sum(tl.sum(tl.sum(one, axis=2), axis=1), axis=0),)
    for block in tl.static_range(EACH):
        offsets = lanes + block * BC
        if block > 0:
            rows = load_streams(x_ptr, token, offsets, offsets < C, C, N, MASKED)
            branch = load_raw(y_ptr, token * C, offsets, offsets < C, MASKED)
        y = branch.to(tl.float32)
        xs = ()
        for i in tl.static_range(N):
            xs = xs + (rows[i].to(tl.float32),)
        for o in tl.static_range(N):
            store_row(out_ptr, (token * N + o) * C, offsets, site_row(xs, y, q, h, o, N, RES >= 0, TRANSPOSE),
                      offsets < C, MASKED)  # fmt: skip


def config(tokens: int, width: int) -> dict[str, int]:
    """The blocks of `post`; a program takes all of a token's, so that Sinkhorn runs once, unless there are few."""
    blocks = post_config(width)
    return {**blocks, "EACH": 1 if tokens <= SHARED else triton.cdiv(width, blocks["BC"])}


def refusal(streams: Tensor) -> str:
    """Why the coefficients of a state [..., n, C] stay a kernel of their own; empty if `post` makes them."""
    tokens = hint(tokens_of(streams))
    return "" if tokens <= MOST else f"{tokens} tokens, Sinkhorn within post is for at most {MOST}"


CONSTANTS = (
    "N", "NP", "K", "KP", "POST", "RES", "NORM", "NORM_EPS", "SIGMOID", "POST_SCALE", "POST_EPS", "SINKHORN",
    "POSITIVITY", "POSITIVE_EPS", "ROW_FIRST", "STEPS", "EPS", "CLAMP",
)  # fmt: skip


@kernel_op(
    "activate_post",
    schema=(
        "(Tensor state, Tensor y, Tensor partial, Tensor bias, Tensor alpha_post, Tensor? alpha_res, int total, "
        f"bool transpose, {ATTRIBUTE_SCHEMA}) -> Tensor"
    ),
)
def forward(
    state: Tensor, y: Tensor, partial: Tensor, bias: Tensor, alpha_post: Tensor, alpha_res: Tensor | None, total: int,
    transpose: bool, *flat: Any,
) -> Tensor:  # fmt: skip
    """X [..., n, C], y [..., C] and partial [S, T, KP] -> X', as `mhc_kernel::activate` and `mhc_kernel::post`."""
    spec, x, branch = spec_of(flat), by_token(state, 2), by_token(y, 1)
    tokens, _, width = x.shape
    out = torch.empty_like(x, dtype=torch.promote_types(state.dtype, y.dtype))
    if nonempty(tokens):
        every, own = activation_constants(spec), config(hint(tokens), width)
        launch(
            activate_post_kernel, (tokens * triton.cdiv(width, own["BC"] * own["EACH"]),), partial.contiguous(),
            bias.contiguous(), alpha_post, alpha_post if alpha_res is None else alpha_res, x, branch, out, tokens,
            TOTAL=total, SPLITS=partial.shape[0], **{name: every[name] for name in CONSTANTS},
            MIX=str(spec.mix_dtype or torch.float32).removeprefix("torch."), C=width, TRANSPOSE=transpose, **own,
        )  # fmt: skip
    return out.view(state.shape)


@forward.register_fake
def _(
    state: Tensor, y: Tensor, partial: Tensor, bias: Tensor, alpha_post: Tensor, alpha_res: Tensor | None, total: int,
    transpose: bool, *flat: Any,
) -> Tensor:  # fmt: skip
    return state.new_empty(state.shape, dtype=torch.promote_types(state.dtype, y.dtype))


@dataclass(frozen=True)
class Found:
    """Coefficients that nothing of a backward reads, and who reads them."""

    coefficients: fx.Node
    """`mhc_kernel::activate`."""
    post: fx.Node | None
    """See `only_post`."""
    normed: bool
    """The pre gate is read by a norm first, which can make it."""


def readers_of(node: fx.Node, index: int) -> list[fx.Node]:
    """Who reads a result of `node`, through views too."""
    return readers(result(node, index))[0]


def is_result(value: Any, node: fx.Node, index: int) -> bool:
    """Whether an argument is this result of `node`, through views too."""
    while isinstance(value, fx.Node) and value.target in VIEWS:
        value = value.args[0]
    return isinstance(value, fx.Node) and value.target is operator.getitem and value.args == (node, index)


def only_post(node: fx.Node) -> fx.Node | None:
    """The `mhc_kernel::post` that takes its gate and its H_res, if it has one, from `node`, an `activate`, where
    nothing else reads them."""
    posts = {*readers_of(node, 1), *readers_of(node, 2)}
    if len(posts) != 1 or str((post := posts.pop()).target) != "mhc_kernel.post.default":
        return None
    named, has_res = arguments(post), "res" in CoefficientSpec.from_op_arguments(arguments(node)).parts
    whole = is_result(named["h_res"], node, 2) if has_res else named["h_res"] is None
    return post if whole and is_result(named["h_post"], node, 1) else None


def find(graph: fx.Graph) -> list[Found]:
    """Every `activate` whose projection is not read: what a graph without a backward has. Changes nothing."""
    found = []
    for node in graph.nodes:
        if str(node.target) == "mhc_kernel.activate.default" and not readers_of(node, 3):
            normed = gate_pre_norm.norm_of(readers_of(node, 0)) is not None
            found.append(Found(node, only_post(node), normed))
    return found


def reason(one: Found) -> str:
    """Why what was found stays as it is; empty if `merge` takes it."""
    if one.post is None:
        return "not one post alone reads what it would make"
    if not one.normed:
        return "the gate is not read by one norm first"
    streams: Tensor = fake(arguments(one.post)["streams"])
    return refusal(streams)


def merge(graph: fx.Graph, log: LoweringLog) -> int:
    """Replace `activate` and `post` by a gate and a post that makes its coefficients, where that can be; returns how
    often. The gate becomes one with its norm."""
    count = 0
    for one in find(graph):
        why = reason(one)
        if why or one.post is None:
            log.record("activate + post", "two kernels", why)
            continue
        given, named = arguments(one.coefficients), arguments(one.post)
        alphas = {part: given.pop(f"alpha_{part}") for part in ("pre", "post", "res")}
        partial, bias, total, *flat = given.values()
        gated = insert_function(
            one.coefficients, torch.ops.mhc_kernel.activate_pre.default, [partial, bias, alphas["pre"], total, *flat]
        )
        values = [named["streams"], named["y"], partial, bias, alphas["post"], alphas["res"], total]
        following = insert_function(
            one.post, torch.ops.mhc_kernel.activate_post.default, [*values, named["transpose"], *flat]
        )
        replace(one.post, following)
        for gate_read in result(one.coefficients, 0):
            gate_read.replace_all_uses_with(gated)
        made = "its gate" if alphas["res"] is None else "its gate and H_res, which is never written"
        log.record("activate + post", "fused", f"post makes {made}")
        count += 1
    if count:
        graph.eliminate_dead_code()
        gate_pre_norm.merge(graph, log)
    return count


__all__ = ["MOST", "Found", "find", "forward", "merge", "reason", "refusal"]
