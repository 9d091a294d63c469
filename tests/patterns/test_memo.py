"""A node is read once while nothing changes, and anew as soon as something may."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import fx

from mhc_compile.patterns.memo import remembered, unchanged


def test_reads_once_within_and_anew_outside() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.relu, (graph.placeholder("x"),))
    reads: list[object] = []

    @remembered
    def meaning(node: fx.Node) -> object:
        reads.append(node.target)
        return node.target

    assert meaning("no node") is None
    assert (meaning(node), meaning(node)) == (torch.relu, torch.relu)
    assert len(reads) == 2
    with unchanged():
        meaning(node)
        with unchanged():
            assert meaning(node) is torch.relu
        assert meaning(node) is torch.relu
        elsewhere: list[object] = []
        thread = threading.Thread(target=lambda: elsewhere.append(meaning(node)))
        thread.start()
        thread.join()
        assert (elsewhere, len(reads)) == ([torch.relu], 4), "another thread may be editing its graph"
    assert len(reads) == 4
    node.target = torch.sigmoid
    assert meaning(node) is torch.sigmoid
    with pytest.raises(ZeroDivisionError), unchanged():
        raise ZeroDivisionError
    meaning(node)
    assert len(reads) == 6
