"""What ``find_sites`` finds, as data: residual sites, the chains they form, and the adds left alone.

A *stream value* is the residual stream at one point: the head of a chain, the sum of a site, or what layout
operations make of them on the way to the next site.
"""

from __future__ import annotations

import dataclasses

from torch import fx, nn

from mhc_compile.capture.graph import qualified_module, user_line


@dataclasses.dataclass(eq=False)
class ResidualSite:
    """One residual add ``sum = carrier + branch(stream)``."""

    add: fx.Node
    """The user's add; its value is the stream after the site."""
    stream: fx.Node
    """The stream value that the branch reads first: the carrier, or the carrier before a cast or reshape."""
    carrier: fx.Node
    """The operand of the add that carries the stream, as the add reads it."""
    outputs: list[tuple[fx.Node, float]]
    """Branch outputs with their factors (parallel branches have several): ``sum = carrier + Σ factor·output``."""
    branch: set[fx.Node]
    """The nodes of the branch: what lies between ``stream`` and ``outputs``."""
    parameters: list[fx.Node]
    """Placeholders of the parameters that the branch reads, in graph order."""
    carrier_path: list[fx.Node] = dataclasses.field(default_factory=list)
    """Operations from ``stream`` to ``carrier`` in graph order (empty when they are one)."""
    carrier_scale: float = 1.0
    """Factor that the add itself applies to the carrier (``torch.add(f, x, alpha=2)``)."""
    merged: list[fx.Node] = dataclasses.field(default_factory=list)
    """Earlier adds of a parallel site (``x + attn`` of ``x + attn + mlp``), which the site replaces."""
    parent: ResidualSite | None = None
    """The site before it on the same stream; None at the head of a chain."""
    entry_path: list[fx.Node] = dataclasses.field(default_factory=list)
    """Operations from the parent's sum (or the head) to ``stream``."""
    after_norm: fx.Node | None = None
    """The norm or other non-linear node between an earlier site and this one, when that is what cuts the stream."""
    cut_by: str = ""
    """The role of ``after_norm`` (see ``roles``)."""
    norm_parent: ResidualSite | None = None
    """The site before that norm."""
    images: frozenset[fx.Node] = frozenset()
    """Linear images of ``stream`` in the branch: where a stream inside the branch begins that is still this one."""
    from_constant: bool = False
    """True when the stream is made of parameters alone here (learned queries), so that the chain begins in them."""
    learns: bool = True
    """False for an add that runs under ``no_grad``: its hyper-connection stays at its start."""
    channel: int = -1
    """Axis of the channels in the carrier (negative)."""
    channels_known: bool = True
    """False when no layer of the branch says which axis that is."""
    kind: str = "site"
    """``attention``, ``cross_attention``, ``mlp``, ``mixer`` or ``site``: a word for the report alone."""
    owner: tuple[nn.Module, tuple[str, ...]] | None = None
    """The module that the add belongs to: (root, names on the way down)."""

    @property
    def where(self) -> str:
        """``file:line`` of the add."""
        return user_line(self.add)

    @property
    def module(self) -> str:
        """Qualified name of the owner, empty for the root."""
        return ".".join(self.owner[1]) if self.owner is not None else qualified_module(self.add)


@dataclasses.dataclass(eq=False)
class ResidualChain:
    """Sites on one residual stream, from its head to its end."""

    sites: list[ResidualSite]
    index: int = 0
    """Position among the chains of the graph."""

    @property
    def head(self) -> fx.Node:
        """The value that is expanded to n streams."""
        return self.sites[0].stream

    @property
    def end(self) -> fx.Node:
        """The sum of the last site, collapsed for whatever follows."""
        return self.sites[-1].add
