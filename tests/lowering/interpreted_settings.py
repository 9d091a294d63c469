"""Every setting that may be chosen for a kernel computes what the fixed one does: under the interpreter, on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mhc_compile import ops
from mhc_compile.lowering import boundary, coefficients, coefficients_backward, post, pre, pre_norm
from tests.lowering.operands import N, operands

pytestmark = pytest.mark.usefixtures("poisoned")
TOKENS = 1000 if torch.cuda.is_available() else 18
FLAT = list(ops.CoefficientSpec(streams=N).op_arguments().values())


def _bits(tensors: Any) -> list[Tensor]:
    return [one.double() for one in (tensors if isinstance(tensors, tuple) else (tensors,)) if one.numel()]


def _cases(width: int) -> dict[str, tuple[Any, str, list[dict[str, int]], Callable[[], Any], bool]]:
    """Kernel -> (module and name of its fixed setting, the others, a call, whether the bits must be the same)."""
    x, g, y, du, q, h, p, scale, phi, bias, alphas, hi, lo = operands(TOKENS, width)
    splits = coefficients.project_splits(TOKENS, 32, N * width, 2)
    partial = coefficients.project(x, hi, lo, 24, 32, splits)
    projection = coefficients.activate(partial, bias, *alphas, N * width, *FLAT)[3]
    back = coefficients_backward.logits_backward(p, q, h, projection, bias, *alphas, N * width, False, *FLAT)
    dealt = boundary.dealt_phi(phi, back[0].dtype, N)
    statistics = pre_norm.forward(x, p, scale, None, "rms", 1e-6, 0.0, True)[1]
    tall = (4096, 32, N * width, 2, splits)
    return {
        "post": (post, "post_config", post.post_others(width), lambda: post.forward(x, y, q, h, False), True),
        "pre": (pre, "post_config", post.post_others(width), lambda: pre.forward(x, p), True),
        "post_dots": (
            post, "dots_config", post.dots_others(width), lambda: post.dots(g, x, y, q, h, False, True), False,
        ),
        "pre_dots": (pre, "dots_config", pre.dots_others(width), lambda: pre.dots(du, x, p), False),
        "pre_norm_dots": (
            pre_norm, "backward_config", pre_norm.backward_others(width),
            lambda: pre_norm.dots(du, x, p, scale, statistics, "rms", 0.0, True, True, True, False), False,
        ),
        "project": (
            coefficients, "project_config", coefficients.project_others(*tall),
            lambda: coefficients.project(x, hi, lo, 24, 32, splits), False,
        ),
        "streams_backward": (
            boundary, "streams_config", boundary.streams_others(4096, width, 2),
            lambda: boundary.streams_backward(x, g, h, False, du, p, back[0], dealt, back[1]), False,
        ),
    }  # fmt: skip


@pytest.mark.parametrize("width", [256, 96])
@pytest.mark.parametrize(
    "kernel", ["post", "pre", "post_dots", "pre_dots", "pre_norm_dots", "project", "streams_backward"]
)
def test_every_setting(kernel: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module, entry, others, call, exact = _cases(width)[kernel]
    expected = _bits(call())
    for setting in others:
        with monkeypatch.context() as patch:
            patch.setattr(module, entry, lambda *_, setting=setting: setting)
            found = _bits(call())
        for one, other in zip(expected, found, strict=True):
            if exact:
                assert torch.equal(one, other), setting
            assert float((one - other).abs().max()) <= 0.01 * float(one.abs().max()), setting
