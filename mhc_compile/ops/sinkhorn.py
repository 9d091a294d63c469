"""sinkhorn: logits [..., n, n] -> a (nearly) doubly stochastic matrix, forward and hand-written backward.

Each half step divides by the sums along one axis, M' = M / d with d = sum(M) + eps. Its backward needs only M' and d:
dM = (g - sum(g * M')) / d. The backward therefore recomputes the iterates from the logits and walks them back; no
history is kept between forward and backward. Source: Sinkhorn & Knopp 1967; mHC (arXiv 2512.24880) equation 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import SemanticOp, compute_dtype, without_autocast

_AXIS = {"row": -1, "column": -2}


def axes(first: str, steps: int) -> list[int]:
    """The dimension that each half step sums over."""
    start = _AXIS[first]
    return [start if index % 2 == 0 else -3 - start for index in range(steps)]


def positive(x: Tensor, positivity: str, positive_eps: float) -> Tensor:
    """The matrix the steps start from (for `log`: its logarithm, the logits themselves)."""
    if positivity == "softmax":
        matrix = torch.softmax(x, -1)
    elif positivity == "exp":
        matrix = torch.exp(x)
    elif positivity == "exp_rowmax":
        matrix = torch.exp(x - x.amax(-1, keepdim=True))
    elif positivity == "abs":
        matrix = x.abs()
    elif positivity == "log":
        return x
    else:
        raise ValueError(f"unknown positivity {positivity!r}")
    return matrix + positive_eps if positive_eps else matrix


def _positive_backward(g: Tensor, x: Tensor, positivity: str) -> Tensor:
    if positivity == "softmax":
        soft = torch.softmax(x, -1)
        return soft * (g - (g * soft).sum(-1, keepdim=True))
    if positivity == "exp":
        return g * torch.exp(x)
    if positivity == "abs":
        return g * torch.sign(x)
    top = x.amax(-1, keepdim=True)
    through = g * torch.exp(x - top)
    # The maximum carries minus the sum of its row's gradients, shared evenly between ties as torch.amax does.
    is_top = (x == top).to(g.dtype)
    return through - is_top / is_top.sum(-1, keepdim=True) * through.sum(-1, keepdim=True)


def _divisor(total: Tensor, eps: float, eps_mode: str) -> Tensor:
    if eps_mode == "clamp":
        return total.clamp(min=eps)
    return total + eps if eps else total


def _steps(matrix: Tensor, dims: list[int], log: bool, eps: float, eps_mode: str) -> Tensor:
    """The half steps on a positive matrix (on its logarithm for `log`, whose result is the matrix)."""
    for dim in dims:
        if log:
            matrix = matrix - matrix.logsumexp(dim, keepdim=True)
        else:
            matrix = matrix / _divisor(matrix.sum(dim, keepdim=True), eps, eps_mode)
    return torch.exp(matrix) if log else matrix


def _steps_backward(g: Tensor, matrix: Tensor, dims: list[int], log: bool, eps: float, eps_mode: str) -> Tensor:
    """Gradient of the result of `_steps` -> gradient of `matrix`; the iterates are recomputed."""
    if log:
        iterates = []
        for dim in dims:
            matrix = matrix - matrix.logsumexp(dim, keepdim=True)
            iterates.append(matrix)
        g = g * torch.exp(matrix)
        for dim, after in zip(reversed(dims), reversed(iterates), strict=True):
            g = g - torch.exp(after) * g.sum(dim, keepdim=True)
        return g
    history = []
    for dim in dims:
        total = matrix.sum(dim, keepdim=True)
        divisor = _divisor(total, eps, eps_mode)
        matrix = matrix / divisor
        history.append((dim, total, divisor, matrix))
    for dim, total, divisor, after in reversed(history):
        inner = (g * after).sum(dim, keepdim=True)
        if eps_mode == "clamp":
            inner = torch.where(total >= eps, inner, torch.zeros_like(inner))
        g = (g - inner) / divisor
    return g


@without_autocast
def native(
    logits: Tensor, positivity: str, positive_eps: float, first: str, steps: int, eps: float, eps_mode: str
) -> Tensor:
    """logits [..., n, n] -> H [..., n, n] in the dtype of the logits, computed in float32 (float64 for float64)."""
    matrix = positive(logits.to(compute_dtype(logits)), positivity, positive_eps)
    return _steps(matrix, axes(first, steps), positivity == "log", eps, eps_mode).to(logits.dtype)


@without_autocast
def native_backward(
    grad: Tensor,
    logits: Tensor,
    positivity: str,
    positive_eps: float,
    first: str,
    steps: int,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """dH [..., n, n] -> dlogits [..., n, n] in the dtype of the logits; the iterates are recomputed."""
    dtype = compute_dtype(logits, grad)
    x, g = logits.to(dtype), grad.to(dtype)
    matrix = positive(x, positivity, positive_eps)
    g = _steps_backward(g, matrix, axes(first, steps), positivity == "log", eps, eps_mode)
    return (g if positivity == "log" else _positive_backward(g, x, positivity)).to(logits.dtype)


# --- run step by step on a CPU ---------------------------------------------------------------------------------------
# The same numbers as `native`, with the tokens innermost in memory: there a sum over n neighbours costs many times what
# n rows of tokens do (4096 tokens, n = 4, 39 steps: forward 9 ms and 3 ms).


def _tokens_last(matrix: Tensor) -> Tensor:
    """[..., n, n] -> [n, n, tokens], contiguous."""
    return matrix.flatten(0, -3).permute(1, 2, 0).contiguous()


def _tokens_first(matrix: Tensor, like: Tensor) -> Tensor:
    """[n, n, tokens] -> [..., n, n], a view."""
    return matrix.permute(2, 0, 1).unflatten(0, like.shape[:-2])


def _on_cpu(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dim() > 2


@without_autocast
def run(
    logits: Tensor, positivity: str, positive_eps: float, first: str, steps: int, eps: float, eps_mode: str
) -> Tensor:
    """As `native`, for execution instead of tracing."""
    if not _on_cpu(logits):
        return native(logits, positivity, positive_eps, first, steps, eps, eps_mode)
    matrix = _tokens_last(positive(logits.to(compute_dtype(logits)), positivity, positive_eps))
    dims = [dim + 2 for dim in axes(first, steps)]
    return _tokens_first(_steps(matrix, dims, positivity == "log", eps, eps_mode), logits).to(logits.dtype)


@without_autocast
def run_backward(
    grad: Tensor,
    logits: Tensor,
    positivity: str,
    positive_eps: float,
    first: str,
    steps: int,
    eps: float,
    eps_mode: str,
) -> Tensor:
    """As `native_backward`, for execution instead of tracing."""
    if not _on_cpu(logits):
        return native_backward(grad, logits, positivity, positive_eps, first, steps, eps, eps_mode)
    dtype = compute_dtype(logits, grad)
    x, g = logits.to(dtype), _tokens_last(grad.to(dtype))
    matrix = _tokens_last(positive(x, positivity, positive_eps))
    dims = [dim + 2 for dim in axes(first, steps)]
    g = _tokens_first(_steps_backward(g, matrix, dims, positivity == "log", eps, eps_mode), logits).contiguous()
    return (g if positivity == "log" else _positive_backward(g, x, positivity)).to(logits.dtype)


@torch.library.custom_op("mhc::sinkhorn", mutates_args=())
def _forward(
    logits: Tensor, positivity: str, positive_eps: float, first: str, steps: int, eps: float, eps_mode: str
) -> Tensor:
    out = run(logits, positivity, positive_eps, first, steps, eps, eps_mode)
    # log without steps on float32 is exp(x): always a new tensor; keep the layout that the fake promises.
    return out.contiguous()


@_forward.register_fake
def _(
    logits: Tensor, positivity: str, positive_eps: float, first: str, steps: int, eps: float, eps_mode: str
) -> Tensor:
    return logits.new_empty(logits.shape)


@torch.library.custom_op("mhc::sinkhorn_backward", mutates_args=())
def _backward(
    grad: Tensor,
    logits: Tensor,
    positivity: str,
    positive_eps: float,
    first: str,
    steps: int,
    eps: float,
    eps_mode: str,
) -> Tensor:
    return run_backward(grad, logits, positivity, positive_eps, first, steps, eps, eps_mode).contiguous()


@_backward.register_fake
def _(
    grad: Tensor,
    logits: Tensor,
    positivity: str,
    positive_eps: float,
    first: str,
    steps: int,
    eps: float,
    eps_mode: str,
) -> Tensor:
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.attributes = inputs[1:]


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (logits,) = ctx.saved_tensors
    gradient = torch.ops.mhc.sinkhorn_backward.default(grad, logits, *ctx.attributes)
    return (gradient, *(None for _ in ctx.attributes))


_forward.register_autograd(_autograd, setup_context=_setup)

sinkhorn = SemanticOp("sinkhorn", native, _forward, native_backward, _backward)
