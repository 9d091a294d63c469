"""Which Triton kernel takes which node: the first provider."""

from __future__ import annotations

from typing import Any

from torch import fx

from .base import LoweringLog, device_of


def refusal(name: str, named: dict[str, Any]) -> str:
    """Why no kernel takes the node; empty if one does."""
    device = device_of(named)
    if device is None or device.type != "cuda":
        return f"no kernel for {device}"
    return "no kernel"


def lower(node: fx.Node, name: str, named: dict[str, Any]) -> None:
    """Replace `node` by its kernel."""
    raise ValueError(f"no kernel for mhc::{name}")


def fuse(graph: fx.Graph, log: LoweringLog) -> None:
    """Fusions over several semantic ops."""
