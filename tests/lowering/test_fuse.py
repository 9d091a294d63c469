"""Which sums of stream gradients are merged. What the merged call computes: interpreted_graphs.py."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import fx

from mhc_compile.lowering import fuse, kernels


def summed(parts: int, shared: bool = False) -> fx.Graph:
    """A backward graph: the gradients of one state through post, pre and something else, added."""
    graph = fx.Graph()
    x, g, y, q, du, p, other = (graph.placeholder(name) for name in ("x", "g", "y", "q", "du", "p", "other"))
    for node in (x, g, other):
        node.meta["val"] = torch.ones(2, 4, 3)
    post = graph.call_function(torch.ops.mhc.post_backward.default, (g, x, y, q, None, False, [True] * 4))
    pre = graph.call_function(torch.ops.mhc.pre_backward.default, (du, x, p, [True] * 2))
    leaves = [*[graph.call_function(operator.getitem, (node, 0)) for node in (post, pre)][:parts], other]
    total = leaves[0]
    for leaf in leaves:
        leaf.meta["val"] = torch.ones(2, 4, 3)
    for leaf in leaves[1:]:
        total = graph.call_function(torch.ops.aten.add.Tensor, (total, leaf))
        total.meta["val"] = torch.ones(2, 4, 3)
    graph.output((total, leaves[0]) if shared else total)
    return graph


def test_found_with_what_else_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "refusal", lambda name, named: "")
    (found,) = fuse.find_stream_gradients(summed(2))
    assert set(found.sources) == {"post", "pre"}
    assert [node.name for node in found.others] == ["other"]


def test_one_part_or_a_shared_gradient_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "refusal", lambda name, named: "")
    assert fuse.find_stream_gradients(summed(1)) == []
    assert fuse.find_stream_gradients(summed(2, shared=True)) == []


def test_without_a_kernel_nothing_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "refusal", lambda name, named: "no kernel here")
    assert fuse.find_stream_gradients(summed(2)) == []
