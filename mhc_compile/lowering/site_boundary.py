"""The gradient of a stream state and, in the same pass, what `post` of the site before makes of it.

`streams_backward` of site l writes dX_l and `post_dots` of site l - 1 reads it again, with X_{l-1} and y. Here a block
of channels is made, stored, and used while it is in registers. X_l, which the norm of the coefficients multiplies by c,
is not read: it is rebuilt from X_{l-1} and y, which are there for the dot products.

    dX_i  = sum_o H[o, i] dX'_o  +  p_i du  +  (dm phi)_i  +  c (sum_j H'[i, j] X_j  +  q_i y)
    dy    = sum_i q_i dX_i;    dq_i = <dX_i, y>;    dH'[i, j] = <dX_i, X_j>

with H, p, dm, c of site l and X, y, q, H' of site l - 1. Traffic, n = 4: dX' 4, du 1, X 4, y 1 -> dX 4, dy 1: 15 u,
where the two kernels move 23. The dot products leave as partial sums, one row a program.

Where the gradient of p has a pass of its own (`single_pass`, whose u was kept: see `pre_norm.pieces`) and nobody reads
it before this kernel has run, it is a by-product, of X and y again:

    dp_i = <du, X_l,i> = sum_j H'[i, j] <du, X_j> + q_i <du, y>
"""

# Kernel bodies are Triton's language: pointers have no Python type, and tuples grow while a loop is unrolled.
# mypy: disable-error-code="no-untyped-def,assignment,misc,unreachable"
# ruff: noqa: ANN001, RUF005

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, fx

from .base import VIEWS, LoweringLog, arguments, fake
from .boundary import GROUP, rows_of_phi, scalars
from .inline import give, insert_function
from .launch import by_token, dot, is_row, kernel_op, launch, nonempty, places, side_by_side


@triton.jit
def dealt_streams(total, BT: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """A tensor-core result [2 BT, 4 x 16] -> the four streams, each [BT, 32], a token's two rows side by side.

    A thread of the tensor core holds rows g and g + 8 of 16, columns 8 j + 2 t + e of each stream. With both rows given
    to one token, for columns 8 j + 2 t + e and 16 + 8 j + 2 t + e of `dealt_phi`, it has the coefficients of one token
    to hold, not of two, and 8 neighbouring channels of it: nothing passes through shared memory (see `boundary.dealt`).
    """
    parts = tl.reshape(total, (BT // 8, 2, 8, 2, 2, 2, 4, 2))
    even, odd = tl.split(tl.reshape(tl.permute(parts, (0, 2, 6, 1, 5, 7, 3, 4)), (BT, 32, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def thread_sums(product, BT: tl.constexpr) -> tl.tensor:
    """[BT, 32] -> [BT, 4]: the 8 neighbours that one thread holds."""
    return tl.sum(tl.reshape(product, (BT, 4, 8)), axis=2)


@triton.jit
def site_boundary_kernel(
    x_ptr, y_ptr, post_ptr, mix_ptr, grad_ptr, res_ptr, du_ptr, pre_ptr, dm_ptr, phi_ptr, multiple_ptr, out_ptr,
    dy_ptr, sums_ptr, tokens, C: tl.constexpr, CP: tl.constexpr, N: tl.constexpr, KP: tl.constexpr,
    WIDTH: tl.constexpr, BT: tl.constexpr, SPAN: tl.constexpr, K: tl.constexpr, HAS_RES: tl.constexpr,
    TRANSPOSE: tl.constexpr, TWO: tl.constexpr, FINE: tl.constexpr, DOTS: tl.constexpr, ALIKE: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Program: BT tokens, SPAN channels (a divisor of C) in steps of 32, all streams. The C // SPAN programs of a token
    take turns: in one step they read 32 channels each, side by side, so that a page of memory is open once. ALIKE: dX'
    is one row for all streams."""
    SPANS: tl.constexpr = C // SPAN
    SUMS: tl.constexpr = N + (N * N if HAS_RES else 0)
    COLUMNS: tl.constexpr = SUMS + (N if DOTS else 0)
    program = tl.program_id(0)
    base = (program // SPANS).to(tl.int64) * BT
    line = tl.arange(0, BT)
    rows = line[:, None]
    there = rows < tokens - base
    state_base = base * (N * C)
    x_ptr += state_base
    grad_ptr += base * C if ALIKE else state_base
    out_ptr += state_base
    du_ptr += base * C
    y_ptr += base * C
    dy_ptr += base * C
    dm_ptr += base * WIDTH
    p = scalars(pre_ptr + base * N, rows, there, N)
    q = scalars(post_ptr + base * N, rows, there, N)
    c = tl.load(multiple_ptr + base + rows, mask=there, other=0.0)
    h = ()
    if HAS_RES:
        h = scalars(res_ptr + base * (N * N), rows, there, N * N)
        mix = scalars(mix_ptr + base * (N * N), rows, there, N * N)
    cm = ()
    cq = ()
    for i in tl.static_range(N):
        cq = cq + (c * q[i],)
        if HAS_RES:
            for j in tl.static_range(N):
                cm = cm + (c * mix[j * N + i if TRANSPOSE else i * N + j],)
    # Row 16 r + 8 h + g of the tensor core is token 8 r + g, its half h; the other half of the contraction meets zeros.
    core = tl.arange(0, 2 * BT)
    ks = tl.arange(0, 2 * KP)
    token = (core // 16 * 8 + core % 8)[:, None]
    mine = (core // 8 % 2)[:, None] == (ks // KP)[None, :]
    known = mine & (token < tokens - base)
    dm = tl.load(dm_ptr + token * WIDTH + (ks % KP)[None, :], mask=known, other=0.0)
    if TWO:
        low = tl.load(dm_ptr + token * WIDTH + KP + (ks % KP)[None, :], mask=known, other=0.0)
    inner = tl.arange(0, 16 * N)[None, :]
    phi_offsets = (ks % KP)[:, None] * (N * CP) + (ks // KP)[:, None] * 16 + inner // 16 * CP + inner % 16
    real = (ks % KP < K)[:, None] & (inner >= 0)
    channels = tl.arange(0, 32)[None, :]
    sums = ()
    for _ in tl.static_range(SUMS + (N + 1 if DOTS else 0)):
        sums = sums + (tl.zeros((BT, 4), dtype=tl.float32),)
    for step in tl.range(0, SPAN, 32, num_stages=STAGES):
        first = step * SPANS + (program % SPANS) * 32
        columns = rows * C + first + channels
        states = rows * (N * C) + first + channels
        gs = ()
        xs = ()
        for o in tl.static_range(N):
            gs = gs + (tl.load(grad_ptr + (columns if ALIKE else states + o * C), mask=there, other=0.0),)
            xs = xs + (tl.load(x_ptr + states + o * C, mask=there, other=0.0),)
        y = tl.load(y_ptr + columns, mask=there, other=0.0).to(tl.float32)
        du = tl.load(du_ptr + columns, mask=there, other=0.0).to(tl.float32)
        dy = tl.zeros((BT, 32), dtype=tl.float32)
        new = ()
        phi = tl.load(phi_ptr + phi_offsets + first, mask=real, other=0.0)
        total = dot(dm, phi, tl.zeros((2 * BT, 16 * N), dtype=tl.float32))
        if TWO:
            total = dot(low, phi, total)
        if FINE:
            rest = tl.load(phi_ptr + KP * (N * CP) + phi_offsets + first, mask=real, other=0.0)
            total = dot(dm, rest, total)
        totals = dealt_streams(total, BT)
        for i in tl.static_range(N):
            value = totals[i] + p[i] * du + cq[i] * y
            if HAS_RES:
                for o in tl.static_range(N):
                    value += h[i * N + o if TRANSPOSE else o * N + i] * gs[o].to(tl.float32)
                    value += cm[i * N + o] * xs[o].to(tl.float32)
            else:
                value += gs[i].to(tl.float32) + c * xs[i].to(tl.float32)
            tl.store(out_ptr + states + i * C, value.to(out_ptr.dtype.element_ty), mask=there)
            dy += q[i] * value
            new = new + (sums[i * (SUMS // N)] + thread_sums(value * y, BT),)
            for j in tl.static_range(SUMS // N - 1):
                new = new + (sums[i * (SUMS // N) + 1 + j] + thread_sums(value * xs[j].to(tl.float32), BT),)
        if DOTS:
            new = new + (sums[SUMS] + thread_sums(du * y, BT),)
            for j in tl.static_range(N):
                new = new + (sums[SUMS + 1 + j] + thread_sums(du * xs[j].to(tl.float32), BT),)
        sums = new
        tl.store(dy_ptr + columns, dy.to(dy_ptr.dtype.element_ty), mask=there)
    # One reduction over the threads of a token for all sums: sums[i (1 + N)] is dq_i, the N behind it dH'[i, j].
    PADDED: tl.constexpr = 4 * N if not HAS_RES else 8 * N
    new = ()
    for i in tl.static_range(SUMS):
        new = new + (sums[i],)
    for i in tl.static_range(N if DOTS else 0):
        total = q[i] * sums[SUMS]
        if HAS_RES:
            for j in tl.static_range(N):
                total += mix[j * N + i if TRANSPOSE else i * N + j] * sums[SUMS + 1 + j]
        else:
            total += sums[SUMS + 1 + i]
        new = new + (total,)
    sums = new
    for _ in tl.static_range(PADDED - COLUMNS):
        sums = sums + (tl.zeros((BT, 4), dtype=tl.float32),)
    packed = tl.reshape(tl.sum(side_by_side(sums), axis=1), (BT, PADDED))
    cell = tl.reshape(places(PADDED), (PADDED,))
    stream = cell // (SUMS // N)
    other = cell % (SUMS // N) - 1
    place = tl.where(other < 0, stream, N + (other * N + stream if TRANSPOSE else stream * N + other))
    place = tl.where(cell < SUMS, place, cell)
    out = sums_ptr + ((program % SPANS).to(tl.int64) * tokens + base) * COLUMNS + rows * COLUMNS + place[None, :]
    tl.store(out, packed, mask=there & (cell < COLUMNS)[None, :])


def refusal(streams: Tensor) -> str:
    """Why a state [..., n, C] keeps the two kernels; empty if this one takes it."""
    n, width = streams.shape[-2:]
    if n != 4:
        return f"{n} streams: the coefficients of four fit the registers"
    if streams.element_size() != 2:
        return f"dtype {streams.dtype}"
    if width % GROUP:
        return f"hidden size {width} is not a multiple of {GROUP}"
    return ""


def config(width: int) -> dict[str, int]:
    """32 tokens, at most 256 channels, four warps; every load runs two steps ahead through shared memory, without which
    the tensor core waits for phi (34 u instead of 22)."""
    span = next(span for span in (256, 128, 64, 32) if width % span == 0)
    return {"BT": 32, "SPAN": span, "STAGES": 3, "num_warps": 4, "num_stages": 3}


def partial_sums(width: int) -> int:
    """Rows of partial dot products that a token gets."""
    return width // config(width)["SPAN"]


def sums_of(n: int, mix: Tensor | None, dots: bool) -> int:
    """Dot products of a token."""
    return n + (0 if mix is None else n * n) + (n if dots else 0)


@kernel_op("site_boundary")
def site_boundary(
    grad: Tensor, h_res: Tensor | None, du: Tensor, h_pre: Tensor, dm: Tensor, phi: Tensor, multiple: Tensor,
    streams: Tensor, y: Tensor, h_post: Tensor, mix: Tensor | None, transpose: bool, dots: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dX [..., n, C], dy [..., C], partial sums [S, T, n + n^2] float32 of dq and, flat, of dH', with `dots` n more of
    dh_pre).

    Site l: grad dX' [..., n, C] (or [..., C] where every stream has the same), h_res [..., n, n] or None, du [..., C],
    h_pre [..., n], dm [T, 2 KP], phi [KP, n, C] (or [2 KP, n, C]) from `dealt_phi`, multiple [T]. Site l - 1: streams
    [..., n, C], y [..., C], h_post [..., n], mix (its H) [..., n, n] or None.
    """
    alike = is_row(grad, streams)
    g, x, branch = by_token(grad, 1 if alike else 2), by_token(streams, 2), by_token(y, 1)
    tokens, n, width = x.shape
    padded = rows_of_phi(dm)
    most = min(padded, n * (n + 2))  # rows of phi that are not padding, whatever the layout
    out, dy = g.new_empty(x.shape), torch.empty_like(branch)
    sums = torch.empty((partial_sums(width), tokens, sums_of(n, mix, dots)), dtype=torch.float32, device=x.device)
    if nonempty(tokens):
        settings = config(width)
        grid = (triton.cdiv(tokens, settings["BT"]) * (width // settings["SPAN"]),)
        launch(
            site_boundary_kernel, grid, x, branch, by_token(h_post, 1), x if mix is None else by_token(mix, 2), g,
            x if h_res is None else by_token(h_res, 2), by_token(du, 1), by_token(h_pre, 1), dm.contiguous(),
            phi.contiguous(), multiple.contiguous(), out, dy, sums, tokens, C=width, CP=phi.shape[2], N=n,
            KP=padded, WIDTH=dm.shape[1], K=most, HAS_RES=mix is not None, TRANSPOSE=transpose,
            TWO=dm.shape[1] == 2 * padded, FINE=phi.shape[0] == 2 * padded, DOTS=dots, ALIKE=alike, **settings,
        )  # fmt: skip
    return out.view(streams.shape), dy.view(y.shape), sums


@site_boundary.register_fake
def _(
    grad: Tensor, h_res: Tensor | None, du: Tensor, h_pre: Tensor, dm: Tensor, phi: Tensor, multiple: Tensor,
    streams: Tensor, y: Tensor, h_post: Tensor, mix: Tensor | None, transpose: bool, dots: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    sums = (partial_sums(streams.shape[-1]), dm.shape[0], sums_of(streams.shape[-2], mix, dots))
    return grad.new_empty(streams.shape), y.new_empty(y.shape), grad.new_empty(sums, dtype=torch.float32)


def _calls(node: object, name: str) -> bool:
    """True for a call of the kernel `name`."""
    return isinstance(node, fx.Node) and node.target is getattr(torch.ops.mhc_kernel, name).default


def _why_apart(source: fx.Node, node: fx.Node) -> str:
    """Why a `streams_backward` and the `post_dots` that reads it stay two kernels; empty if this one takes both."""
    before, named = arguments(source), arguments(node)
    if reason := refusal(fake(named["streams"])):
        return reason
    if not named["need_y"]:
        return "nobody wants the gradient of the branch"
    missing = [name for name in ("grad", "du", "h_pre", "dm", "phi", "multiple") if before[name] is None]
    if missing:
        return f"the gradient of the state has no {', '.join(missing)}"
    if (before["h_res"] is None) != (named["h_res"] is None):
        return "one of the two sites has no H_res"
    if named["h_res"] is not None and before["transpose"] != named["transpose"]:
        return "H_res is transposed in one of the two sites"
    dtypes = {fake(value).dtype for value in (source, before["grad"], named["streams"], named["y"])}
    if len(dtypes) > 1:
        return f"dtypes {', '.join(sorted(map(str, dtypes)))}"
    if not all(user is node or node < user for user in source.users):
        return "somebody reads the gradient in between"
    return ""


def find(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node, str]]:
    """(streams_backward, post_dots, why they stay apart, empty if they do not) of neighbouring sites. Changes
    nothing."""
    found = []
    for node in graph.nodes:
        if _calls(node, "post_dots") and _calls(source := arguments(node)["grad"], "streams_backward"):
            found.append((source, node, _why_apart(source, node)))
    return found


def _gate_gradient(source: fx.Node, node: fx.Node) -> fx.Node | None:
    """The `pre_dots` of the gradient's own state and branch input, where nobody reads it before `node`."""
    before = arguments(source)
    for dots in before["du"].users:
        if not _calls(dots, "pre_dots"):
            continue
        named = arguments(dots)
        alike = named["grad"] is before["du"] and named["streams"] is before["streams"]
        if alike and all(node < user for user in dots.users):
            return dots
    return None


def merge(graph: fx.Graph, log: LoweringLog) -> int:
    """Replace every pair that can be one call by it; returns how many."""
    found = find(graph)
    for _, _, reason in found:
        if reason:
            log.record("site boundary", "two kernels", reason)
    pairs = [(source, node) for source, node, reason in found if not reason]
    for source, node in pairs:
        before, named = arguments(source), arguments(node)
        gate = _gate_gradient(source, node)
        values = [before[name] for name in ("grad", "h_res", "du", "h_pre", "dm", "phi", "multiple")]
        values += [named[name] for name in ("streams", "y", "h_post", "h_res", "transpose")]
        values.append(gate is not None)
        d_streams, dy, sums = insert_function(node, torch.ops.mhc_kernel.site_boundary.default, values)
        source.replace_all_uses_with(d_streams)
        _give_sums(node, gate, sums)
        for user in node.users:
            if user.args[1] == 0:
                user.replace_all_uses_with(dy)
        more = " + gradient of the gate" if gate is not None else ""
        log.record("site boundary", "fused", f"stream gradient + dot products of the post before{more}")
    if pairs:
        graph.eliminate_dead_code()
    return len(pairs)


def _reader(node: fx.Node, name: str) -> fx.Node | None:
    """The one `logits_backward` that takes `node` as its argument `name`, directly or through views; None if anything
    else reads it."""
    while len(node.users) == 1:
        (user,) = node.users
        if _calls(user, "logits_backward"):
            return user if arguments(user)[name] is node else None
        if user.target not in VIEWS:
            return None
        node = user
    return None


def _give_sums(node: fx.Node, gate: fx.Node | None, sums: fx.Node) -> None:
    """Hand the partial sums to the readers of what `node`, `post_dots`, and `gate`, `pre_dots`, gave: whole, where one
    `logits_backward` reads all of it; else added up and apart."""
    n, width = fake(node.args[3]).shape[-1], fake(sums).shape[2]
    own = width - (n if gate is not None else 0)
    results = {user.args[1]: user for user in node.users}
    columns = [("d_post", results.get(1), 0, n), ("d_res", results.get(2), n, own), ("d_pre", gate, own, width)]
    read = [(name, value, start, end) for name, value, start, end in columns if value is not None and value.users]
    logits, *more = {_reader(value, name) for name, value, _, _ in read} or {None}
    if logits is not None and not more and sum(end - start for _, _, start, end in read) == width:
        give(logits, arguments(logits) | {name: None for name, _, _, _ in read} | {"d_post": sums})
        return
    for _, value, start, end in read:
        like = fake(value)

        def part(total: Tensor, start: int = start, end: int = end, like: Tensor = like) -> Tensor:
            return total.sum(0)[:, start:end].reshape(like.shape).to(like.dtype)

        value.replace_all_uses_with(insert_function(node, part, [sums]))
