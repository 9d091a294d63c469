"""The log and the reading of nodes."""

from __future__ import annotations

import torch
from torch import fx

from mhc_compile.config import Options
from mhc_compile.lowering.base import BACKWARD_TARGETS, FORWARD_TARGETS, LoweringLog, arguments, device_of, options_key
from mhc_compile.ops import OPS


def test_log_counts_and_gives_each_reason_once() -> None:
    log = LoweringLog()
    for _ in range(2):
        log.record("pre", "inductor", "because")
    log.record("pre", "triton")
    assert log.counts()["pre", "inductor"] == 2
    assert [entry.reason for entry in log.reasons()] == ["because"]


def test_arguments_fill_in_defaults() -> None:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("x", "y", "q")]
    nodes[0].meta["val"] = torch.ones(2, 4, 3, device="meta")
    named = arguments(graph.call_function(torch.ops.mhc.post.default, (*nodes,), {"h_res": None}))
    assert list(named) == ["streams", "y", "h_post", "h_res", "transpose"]
    assert named["transpose"] is False
    assert device_of({"streams": nodes[0]}) == torch.device("meta")
    assert device_of({}) is None


def test_targets_and_key() -> None:
    assert len(FORWARD_TARGETS) == len(BACKWARD_TARGETS) == len(OPS)
    assert options_key(None) == ()
    assert ("fuse", True) in options_key(Options())
