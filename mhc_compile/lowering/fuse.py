"""Fusions over several semantic ops on a partitioned graph, each pattern, check, replace."""

from __future__ import annotations

from torch import fx

from .base import LoweringLog


def run(graph: fx.Graph, log: LoweringLog) -> None:
    """All fusions, in order."""
