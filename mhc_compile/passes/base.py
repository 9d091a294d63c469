"""What every pass takes and what it gives back.

A pass is ``def name(gm, ctx) -> PassResult``: it edits our private copy of Dynamo's graph (never Dynamo's own) and
says how many things it changed. Analysis (``find_sites``) returns data that a rewrite (``widen``) consumes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import fx

from mhc_compile.config import Options

if TYPE_CHECKING:
    from torch import nn

    from mhc_compile.capture.modules import ModuleMap
    from mhc_compile.passes.sites import ResidualChain, ResidualSite


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Something that looked like ours and was left as it is, and why."""

    what: str
    """The thing in the user's words, e.g. ``residual add`` or ``sinkhorn``."""
    reason: str
    where: str = ""
    """``file:line`` of the user's code, empty when the graph does not say."""
    module: str = ""
    """Qualified name of the module that owns the line."""

    def __str__(self) -> str:
        place = " ".join(part for part in (self.module, f"({self.where})" if self.where else "") if part)
        return f"{self.what} {place}: {self.reason}" if place else f"{self.what}: {self.reason}"


@dataclasses.dataclass
class PassResult:
    """What a pass did: ``changed`` counts its own unit (sites widened, chains raised)."""

    name: str
    changed: int = 0
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)
    refusals: list[Refusal] = dataclasses.field(default_factory=list)


class ParameterProvider(Protocol):
    """Where a pass gets the parameters of a site: the model room implements it, so that passes know no modules."""

    def site(self, chain: ResidualChain, site: ResidualSite, spec: Any, width: int) -> dict[str, fx.Node]:
        """Placeholders ``phi, bias, alpha_pre[, alpha_post, alpha_res]`` of the site."""
        ...

    def head(self, chain: ResidualChain, spec: Any, width: int) -> dict[str, fx.Node]:
        """Placeholders ``phi, bias, alpha_pre`` of the learned collapse at the chain's end."""
        ...


@dataclasses.dataclass
class PassContext:
    """What the passes share about one captured graph."""

    options: Options
    modules: ModuleMap | None = None
    """Which module owns which parameter; None for a graph without owner information (hand-made graphs in tests)."""
    parameters: ParameterProvider | None = None
    """None while a pass that creates no parameters runs."""
    is_parameter: Callable[[fx.Node], bool] = lambda node: False
    """True for a placeholder that is a parameter or buffer of the model (not an activation)."""
    is_buffer: Callable[[fx.Node], bool] = lambda node: False
    """True for those of them that are buffers."""
    break_reason: str = ""
    """Why a graph break ends this graph, with the user's line; empty if none does."""
    resumed: bool = False
    """True when the graph continues a frame that a graph break has cut."""
    inside: str = ""
    """Name of a larger module in whose call this graph was compiled on its own; empty if there is none."""
    callers: Sequence[nn.Module] = ()
    """The modules in whose call the graph was compiled on its own, innermost first."""
    chains: Sequence[ResidualChain] = ()
    """Filled by ``find_sites``, consumed by ``widen``."""


Pass = Callable[[fx.GraphModule, PassContext], PassResult]


def run_pass(step: Pass, gm: fx.GraphModule, ctx: PassContext) -> PassResult:
    """Run one pass, time it, and check that the graph it leaves is well formed."""
    start = time.perf_counter()
    result = step(gm, ctx)
    if result.changed:
        gm.graph.lint()
    result.seconds = time.perf_counter() - start
    return result
