"""The logits before projection, or the coefficients as well: which of the two is kept for the backward, by cost.

The backward of a site reads both: post and res mix the gradient of the streams, and the projection (m, r), the logits
but for a scale and a bias, is where the backward of gates and Sinkhorn starts. Keeping the logits alone is fewer bytes,
n^2 + 2 n + 1 numbers a token instead of 2 (n^2 + 2 n) + 1, at the price of one more run of gates and Sinkhorn a site.
That is bound by the latency of its half steps, which follow one another, not by what it moves.

Whether it pays is a matter of what else the same bytes cost: a stream state that is replayed gives two hundred times as
many (4096 tokens of the Qwen3 shape) in five times the time; with streams of a few channels it is the other way. So a
chain has two forms (`logits_alone` makes the second of the first), each with its plans of what is replayed, and what is
taken is chosen among the plans of both. ``lowering.logits_alone`` acts on it.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Sequence

from torch import fx

from mhc_compile.compat import runs_joint_passes
from mhc_compile.config import Options
from mhc_compile.cost import Device, bytes_of, elements, tensors_of, value_of
from mhc_compile.lowering import kernels
from mhc_compile.lowering.base import FEW, arguments
from mhc_compile.lowering.inductor import SINKHORN_INLINE_STEPS
from mhc_compile.passes.activations import Live
from mhc_compile.passes.boundaries import Chain
from mhc_compile.passes.states import State

HALF_STEP = 0.17e-6
"""Seconds of one half step of Sinkhorn on chip. They run one after the other whatever the number of tokens: `activate`
with 40 of them takes 9.0 to 9.4 us on an H200 (benchmarks/results/ops.json), less a launch of 2.5 us. Not measured of
the device at hand, as `cost` measures its numbers."""

FORMS = ("coefficients", "logits")
"""What a plan may keep; a test leaves it one of them."""


@dataclasses.dataclass(frozen=True)
class Logits:
    """Coefficients and logits kept, or the logits alone: what that comes to for all sites of a graph."""

    kept: int = 0
    """Bytes a site: coefficients and projection."""
    alone: int = 0
    """Bytes a site: the projection alone."""
    saved: int = 0
    """Bytes of all sites."""
    seconds: float = 0.0
    """Time of gates and Sinkhorn once more at every site."""
    instead: float = 0.0
    """Time for the same bytes by replaying stream states."""
    chosen: bool = False
    """True where the logits alone are kept."""
    refusal: str = ""
    """Why that was no choice."""

    def line(self, peak: int) -> str:
        """For the report; empty without coefficients."""
        if not self.saved:
            return ""
        kept, alone = (f"{size / 2**10:,.1f} KiB" for size in (self.kept, self.alone))
        what = (
            f"{self.saved / 2**20:,.2f} MiB less ({self.saved / max(peak, 1):.2%} of the peak) for "
            f"{self.seconds * 1e3:.3f} ms of gates and Sinkhorn again"
        )
        if self.chosen:
            return f"logits kept without the coefficients, {alone} a site at most instead of {kept}: {what}"
        text = f"coefficients and logits kept, {kept} a site at most; the logits alone would be {alone}: {what}"
        rest = self.refusal or f"replayed states give the same bytes for {self.instead * 1e3:.3f} ms"
        return f"{text}; {rest}"


def compare(nodes: Sequence[fx.Node], chain: Chain, device: Device, chosen: bool = False, refusal: str = "") -> Logits:
    """The two ways for the coefficients of one chain of states."""
    if not nodes:
        return Logits()
    whole = [bytes_of(node) for node in nodes]
    logits = [_projection_bytes(node) for node in nodes]
    saved = sum(whole) - sum(logits)
    replayed = [site for site in chain.sites if site.state_seconds > 0]
    least = (site.state_seconds if site.run_seconds is None else site.run_seconds for site in replayed)
    rate = min((time / max(site.state, 1) for time, site in zip(least, replayed, strict=True)), default=float("inf"))
    return Logits(max(whole), max(logits), saved, seconds_again(nodes, device), rate * saved, chosen, refusal)


def total(parts: Sequence[Logits]) -> Logits:
    """Of several chains; where some keep the logits alone, of these."""
    parts = [part for part in parts if part.chosen] or list(parts)
    return Logits(
        max((part.kept for part in parts), default=0),
        max((part.alone for part in parts), default=0),
        sum(part.saved for part in parts),
        sum(part.seconds for part in parts),
        sum(part.instead for part in parts),
        any(part.chosen for part in parts),
        next((part.refusal for part in parts if part.refusal), ""),
    )


def kept_bytes(state: State, again: Collection[fx.Node]) -> int:
    """Bytes of a site's coefficients and projection, of those that are made again the projection alone."""
    return sum(_projection_bytes(node) if node in again else bytes_of(node) for node in state.coefficients)


def seconds_again(nodes: Iterable[fx.Node], device: Device) -> float:
    """Time of gates and Sinkhorn once more: a launch a site, what it reads and writes, its half steps."""
    return sum(device.latency + bytes_of(node) / device.bandwidth + _half_steps(node) * HALF_STEP for node in nodes)


def logits_alone(
    states: Sequence[State],
    chain: Chain,
    device: Device,
    again: Collection[fx.Node],
    live: Callable[[Sequence[int]], Live],
) -> Chain:
    """A chain that keeps coefficients -> the same chain with the logits alone of those in `again`.

    `live` gives what is live beside the streams for the bytes that each site's coefficients keep. What is made again is
    counted whole until its site has run backward; of post and res that is an upper bound.
    """
    less = live([kept_bytes(state, again) for state in states])
    back = [kept_bytes(state, ()) - kept_bytes(state, again) for state in states]
    sites = tuple(
        dataclasses.replace(
            site,
            live=less.sites[index],
            border=less.borders[index],
            again=back[index],
            ahead=back[index - 1] if index and _mixed_by(states[index], states[index - 1]) else 0,
        )
        for index, site in enumerate(chain.sites)
    )
    seconds = chain.seconds + seconds_again(again, device)
    return dataclasses.replace(chain, sites=sites, head=less.head, seconds=seconds)


def made_again(states: Sequence[State], options: Options) -> tuple[list[fx.Node], str]:
    """(the coefficients of a chain that can be made again bit for bit, why there are none)."""
    nodes = [node for state in states for node in state.coefficients]
    if options.compiler != "inductor":
        return [], f"the compiler {options.compiler!r} has no pass over the joint graph"
    if not runs_joint_passes():
        return [], "inductor's joint passes are switched off"
    reasons = {node: _refusal(node, options) for node in nodes}
    found = [node for node in nodes if not reasons[node]]
    return found, "" if found else next(iter(reasons.values()), "")


def _refusal(node: fx.Node, options: Options) -> str:
    """The forward and the backward have to run one and the same code: our kernels' arithmetic, or one call of the
    native body. What inductor writes of gates and Sinkhorn depends on what it fuses them with."""
    named = {name: value_of(value) if isinstance(value, fx.Node) else value for name, value in arguments(node).items()}
    x = named["x"]
    reason = "lowering='native'" if options.lowering == "native" else kernels.platform_refusal(x.device)
    if not reason:
        from mhc_compile.lowering import coefficients

        reason = coefficients.refusal(named, x, named["phi"], backward=False)
    if reason:
        one_call = x.device.type == "cpu" and _half_steps(node) > SINKHORN_INLINE_STEPS  # lowering.opaque
        return "" if one_call else f"gates by inductor would not be the same bits twice ({reason})"
    tokens = elements(x) // max(x.shape[-1] * x.shape[-2], 1)
    if options.fuses("few_tokens") and tokens <= FEW:
        return "few tokens, whose kernel sums in another order"
    return ""


def _mixed_by(state: State, before: State) -> bool:
    """True where a branch input of `state` is mixed by coefficients of the state before it."""
    gates = [pre.args[1] for pre in state.pres]
    return any(
        isinstance(gate, fx.Node) and gate.target is operator.getitem and gate.args[0] in before.coefficients
        for gate in gates
    )


def _projection_bytes(node: fx.Node) -> int:
    projection = list(tensors_of(value_of(node)))[3]
    return elements(projection) * projection.element_size()


def _half_steps(node: fx.Node) -> int:
    named = arguments(node)
    return int(named["sinkhorn_steps"]) if named["res"] == "sinkhorn" else 0
