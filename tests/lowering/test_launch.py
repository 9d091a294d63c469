"""Sizes, hints and the ops that launch kernels."""

from __future__ import annotations

import pytest
import torch

from tests.lowering.hopper import compiler_missing

pytestmark = pytest.mark.skipif(compiler_missing(), reason="needs Triton")


def test_sizes() -> None:
    from mhc_compile.lowering import launch

    assert launch.chunk_of(4096) == 1024
    assert launch.chunk_of(2560) == 512
    assert launch.block_of(50, 1024) == 64
    assert launch.by_token(torch.ones(2, 3, 4, 5), 2).shape == (6, 4, 5)
    assert launch.tokens_of(torch.ones(2, 3, 4, 5)) == 6
    assert (launch.hint(7), launch.nonempty(0), launch.nonempty(3)) == (7, False, True)


def test_every_kernel_op_can_be_opened() -> None:
    from mhc_compile.lowering import boundary, launch, post, pre, sinkhorn  # noqa: F401  # they register their ops

    names = {str(op).split(".")[1] for op in launch.KERNEL_OPS}
    assert {"project", "activate", "pre", "post", "post_dots", "pre_dots", "streams_backward"} <= names
