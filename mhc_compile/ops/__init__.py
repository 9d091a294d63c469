"""The vocabulary: the semantic ops, registered under `torch.ops.mhc` when this package is imported (no CUDA call).

    expand(x, streams)                                              -> X
    coefficients(X, phi, bias, alpha_pre, alpha_post?, alpha_res?, **CoefficientSpec.op_arguments())
                                                                    -> (pre, post, res, projection)
    sinkhorn(logits, **SinkhornSpec.op_arguments())                 -> H
    pre(X, h_pre)                                                   -> u
    post(X, y, h_post, h_res?, transpose=False)                     -> X'
    collapse(X, kind)                                               -> x
    stream_norm(X, weight?, offset, eps)                            -> Y, each stream over its own root mean square
    channel_pre(X, down, up, inner, scale)                          -> (u, hidden), a gate per channel
    pre_norm(X, h_pre, weight?, bias?, kind, eps, offset, round_first)
                                                                    -> (out, statistics), pre and the branch's norm
    activate(projection, bias, alpha_pre, alpha_post?, alpha_res?, **CoefficientSpec.op_arguments())
                                                                    -> (pre, post, res), coefficients from what is kept

Widened models use the first six; stream_norm and channel_pre are what some families with hyper-connections of their
own have; pre_norm is what `passes.fold_norms` makes of a pre and the norm behind it; activate is put in behind autograd
(`lowering.logits_alone`) and has no gradient.

X is [..., n, C]: stream axis at -2, channels last. Each op is a `SemanticOp`: call it, or use `.native` (plain
PyTorch, the op's meaning), `.native_backward`, `.overload` (`torch.ops.mhc.<name>.default`) and `.backward_overload`.
"""

from .activate import activate
from .base import ForwardOp, SemanticOp
from .channel_pre import channel_pre
from .coefficients import coefficients
from .collapse import collapse
from .expand import expand
from .post import post
from .pre import pre
from .pre_norm import pre_norm
from .sinkhorn import sinkhorn
from .spec import CoefficientSpec, SinkhornSpec
from .stream_norm import stream_norm

OPS: dict[str, SemanticOp] = {
    op.name: op for op in (expand, coefficients, sinkhorn, pre, post, collapse, stream_norm, channel_pre, pre_norm)
}
"""What a model may hold: each with a gradient."""

INNER_OPS: dict[str, ForwardOp] = {activate.name: activate}
"""What passes put into graphs behind autograd."""

__all__ = [
    "INNER_OPS",
    "OPS",
    "CoefficientSpec",
    "ForwardOp",
    "SemanticOp",
    "SinkhornSpec",
    "activate",
    "channel_pre",
    "coefficients",
    "collapse",
    "expand",
    "post",
    "pre",
    "pre_norm",
    "sinkhorn",
    "stream_norm",
]
