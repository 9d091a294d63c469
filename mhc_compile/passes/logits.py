"""The logits before projection, or the coefficients as well: which of the two is kept for the backward, by cost.

The backward of a site reads both: post and res mix the gradient of the streams, and the projection (m, r), the logits
but for a scale and a bias, is where the backward of gates and Sinkhorn starts. Keeping the logits alone is fewer bytes,
n^2 + 2 n + 1 numbers a token instead of 2 (n^2 + 2 n) + 1, at the price of one more run of gates and Sinkhorn a site.
That is bound by the latency of its half steps, which follow one another, not by what it moves.

Whether it pays is a matter of what else the same bytes cost: a stream state that is replayed gives two hundred times as
many (4096 tokens of the Qwen3 shape) in five times the time. Both are kept, therefore, and the numbers are in the
report.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import fx

from mhc_compile.cost import Device, bytes_of, elements, tensors_of, value_of
from mhc_compile.lowering.base import arguments
from mhc_compile.passes.boundaries import Chain
from mhc_compile.passes.states import State

HALF_STEP = 0.17e-6
"""Seconds of one half step of Sinkhorn on chip. They run one after the other whatever the number of tokens: `activate`
with 40 of them takes 9.0 to 9.4 us on an H200 (benchmarks/results/ops.json), less a launch of 2.5 us. Not measured of
the device at hand, as `cost` measures its numbers: a line of the report depends on it and no decision does."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """What keeping the logits alone would come to, for all sites of a graph."""

    kept: int = 0
    """Bytes a site: coefficients and projection, as they are kept."""
    alone: int = 0
    """Bytes a site: the projection alone."""
    saved: int = 0
    """Bytes of all sites."""
    seconds: float = 0.0
    """Time of gates and Sinkhorn once more at every site."""
    instead: float = 0.0
    """Time for the same bytes by replaying stream states."""

    @property
    def pays(self) -> bool:
        """True where the logits alone are the cheaper way to save these bytes."""
        return self.saved > 0 and self.seconds < self.instead

    def line(self, peak: int) -> str:
        """For the report; empty without coefficients."""
        if not self.saved:
            return ""
        text = (
            f"coefficients and logits kept, {self.kept / 2**10:,.1f} KiB a site at most; the logits alone would be "
            f"{self.alone / 2**10:,.1f} KiB: {self.saved / 2**20:,.2f} MiB less ({self.saved / max(peak, 1):.2%} of "
            f"the peak) for {self.seconds * 1e3:.3f} ms of gates and Sinkhorn again"
        )
        if self.pays:
            return f"{text}: cheaper than replayed states, but no lowering of ours does it"
        return f"{text}; replayed states give the same bytes for {self.instead * 1e3:.3f} ms"


def compare(states: Sequence[State], chain: Chain, device: Device) -> Logits:
    """The two ways for one chain of states."""
    nodes = [node for state in states for node in state.coefficients]
    if not nodes:
        return Logits()
    whole = [bytes_of(node) for node in nodes]
    logits = [_projection_bytes(node) for node in nodes]
    saved = sum(whole) - sum(logits)
    again = sum(device.latency + size / device.bandwidth + _half_steps(node) * HALF_STEP
                for node, size in zip(nodes, whole, strict=True))  # fmt: skip
    replayed = [site for site in chain.sites if site.state_seconds > 0]
    least = (site.state_seconds if site.run_seconds is None else site.run_seconds for site in replayed)
    rate = min((time / max(site.state, 1) for time, site in zip(least, replayed, strict=True)), default=float("inf"))
    return Logits(max(whole), max(logits), saved, again, rate * saved)


def total(parts: Sequence[Logits]) -> Logits:
    """Of several chains."""
    return Logits(
        max((part.kept for part in parts), default=0),
        max((part.alone for part in parts), default=0),
        sum(part.saved for part in parts),
        sum(part.seconds for part in parts),
        sum(part.instead for part in parts),
    )


def _projection_bytes(node: fx.Node) -> int:
    projection = list(tensors_of(value_of(node)))[3]
    return elements(projection) * projection.element_size()


def _half_steps(node: fx.Node) -> int:
    named = arguments(node)
    return int(named["sinkhorn_steps"]) if named["res"] == "sinkhorn" else 0
