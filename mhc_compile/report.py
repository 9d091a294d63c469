"""What was converted, what was left alone and why, and what it costs: for people and for tools.

Reads only what the passes returned.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import logging
from typing import Any

from torch import fx

from mhc_compile.capture.graph import user_line
from mhc_compile.config import Resolved
from mhc_compile.lowering.base import LoweringLog
from mhc_compile.passes.base import PassResult, Refusal
from mhc_compile.passes.recompute import RecomputeResult, StateRow
from mhc_compile.passes.sites import ResidualChain, ResidualSite
from mhc_compile.scheduler.schedule import ScheduleLog

log = logging.getLogger("mhc_compile")


@dataclasses.dataclass(frozen=True)
class SiteRow:
    """One widened site."""

    chain: int
    index: int
    """Position in its chain."""
    module: str
    kind: str
    where: str
    """The user's ``file:line`` of the add."""
    shape: str
    parameters: str
    """Qualified name of the site's hyper-connection."""
    gradient: bool = True
    """False for a site that runs under ``no_grad``, whose hyper-connection stays at its start."""


@dataclasses.dataclass
class CompileReport:
    """The outcome of one conversion. ``str()`` fits a terminal, ``to_json()`` is for tools."""

    model: str
    options: dict[str, Any]
    """Every option as resolved."""
    set_by: dict[str, str]
    """Who set each option: default, options, mode, preset or environment."""
    sites: list[SiteRow] = dataclasses.field(default_factory=list)
    left_alone: list[Refusal] = dataclasses.field(default_factory=list)
    """Adds and chains that looked like ours and were not touched, each with its reason."""
    passes: list[PassResult] = dataclasses.field(default_factory=list)
    added: dict[str, int] = dataclasses.field(default_factory=dict)
    """Parameters of this conversion: ``tensors``, ``elements``, ``bytes``, and ``new`` among the tensors."""
    raised: int = 0
    """Operations of hand-written hyper-connections that were replaced by ours."""
    error: str = ""
    """Why nothing was converted, empty on success."""
    log: LoweringLog = dataclasses.field(default_factory=LoweringLog)
    """Which provider took each op and why; inductor fills it, for the backward graph at the first backward."""
    schedule: ScheduleLog = dataclasses.field(default_factory=ScheduleLog)
    """What runs on a second stream and why; filled as ``log`` is. Empty without the option ``schedule``."""
    graph: str = ""
    """The readable rewritten graph."""

    @property
    def chains(self) -> int:
        """Number of chains widened."""
        return len({row.chain for row in self.sites})

    @property
    def lowering(self) -> list[str]:
        """One line for each op and provider, then the reasons of those that got no kernel, then the settings of kernels
        that were tuned."""
        lines = [f"{op}: {count} x {provider}" for (op, provider), count in self.log.counts().items()]
        lines += [f"{entry.op} to {entry.provider}: {entry.reason}" for entry in self.log.reasons()]
        return lines + [f"tuned: {line}" for line in self.log.tuned]

    def to_json(self, indent: int | None = 2) -> str:
        """Everything but the graph."""
        data = dataclasses.asdict(self)
        del data["graph"], data["log"]
        data["lowering"] = self.lowering
        data["schedule"] = self.schedule.lines()
        return json.dumps(data, indent=indent, default=str)

    def __str__(self) -> str:
        from rich.console import Console

        buffer = io.StringIO()
        console = Console(file=buffer, width=110, color_system=None, legacy_windows=False)
        for part in self._parts():
            console.print(part)
        return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())

    def _parts(self) -> list[Any]:
        from rich.table import Table
        from rich.text import Text

        asked = ", ".join(f"{k}={self.options[k]!r} ({who})" for k, who in self.set_by.items() if who != "default")
        parts: list[Any] = [Text(f"mhc_compile: {self.model}"), Text(f"options: {asked or 'all defaults'}")]
        if self.error:
            parts.append(Text(f"not converted: {self.error}"))
        parts.append(Text(self._summary()))
        if self.sites:
            table = Table("#", "module", "kind", "line", "stream", "parameters", box=None, pad_edge=False)
            for row in self.sites:
                table.add_row(
                    f"{row.chain}.{row.index}",
                    row.module or "(root)",
                    row.kind,
                    _short(row.where),
                    row.shape,
                    row.parameters,
                )
            parts.append(table)
        if self.left_alone:
            parts.append(Text("left alone:"))
            parts.extend(Text(f"  {refusal}") for refusal in self.left_alone)
        for result in self.passes:
            if isinstance(result, RecomputeResult) and (result.rows or result.notes):
                parts.extend(_recompute(result))
        passes = ", ".join(f"{p.name} {p.changed} in {p.seconds * 1e3:.0f} ms" for p in self.passes)
        parts.append(Text(f"passes: {passes}"))
        if any(entry.provider == "triton" for entry in self.log.entries):  # elsewhere there is no kernel to fold into
            parts.extend(Text(f"  {p.name}: {note}") for p in self.passes if p.name == "fold_norms" for note in p.notes)
        parts.extend(Text(f"  {line}") for line in self.lowering)
        parts.extend(Text(f"schedule: {line}") for line in self.schedule.lines())
        return parts

    def _summary(self) -> str:
        text = f"{len(self.sites)} sites in {self.chains} chains widened, {self.raised} ops raised"
        text += f", {len(self.left_alone)} left alone"
        if self.added:
            text += (
                f"; {self.added['elements']:,} parameters ({self.added['bytes'] / 2**20:.2f} MiB) "
                f"in {self.added['tensors']} tensors, {self.added['new']} of them new"
            )
        return text


def _recompute(result: RecomputeResult) -> list[Any]:
    """What is kept and what is replayed, in bytes a site, a line for each run of equal sites, and what that comes to.
    Coefficients (with the projection that their backward reads) and branch outputs are always kept."""
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Text(f"recompute: {note}") for note in result.notes]
    if not result.rows or not result.changed:
        return parts
    text = f"recompute: {_mib(result.kept_bytes)} of states and branch inputs kept, {_mib(result.kept_without)} without"
    text += f"; predicted peak {_mib(result.peak)}, {_mib(result.peak_without)} without"
    text += f"; replay {result.replay_seconds * 1e3:.2f} ms a step on {result.device}"
    parts.append(Text(text))
    if line := result.logits.line(result.peak):
        parts.append(Text(line))
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes a site", no_wrap=True)
    for name in ("state kept", "replayed", "input kept", "replayed", "coefficients", "branch output"):
        table.add_column(name, no_wrap=True, justify="right")
    for run in _runs(result.rows):
        first, last = run[0], run[-1]
        label = f"{first.chain}.{first.index}" + (f"..{last.index}" if last is not first else "")
        table.add_row(label, *(_mib(size) if size else "-" for size in _bytes(first)))
    sums = [sum(sizes) for sizes in zip(*map(_bytes, result.rows), strict=True)]
    table.add_row("all together", *(_mib(size) if size else "-" for size in sums))
    parts.append(table)
    return parts


def _bytes(row: StateRow) -> list[int]:
    """Of its state and of its branch input what is kept and what is replayed; coefficients; branch output."""
    replayed = 0 if row.state == "kept" else row.state_bytes
    kept = row.branch_input == "kept"
    inputs = (row.input_bytes, 0) if kept else (0, row.input_bytes)
    return [row.kept_bytes, replayed, *inputs, row.coefficient_bytes, row.output_bytes]


def _runs(rows: list[StateRow]) -> list[list[StateRow]]:
    """Sites one after another with the same numbers."""
    return [list(run) for _, run in itertools.groupby(rows, lambda row: (row.chain, row.state, _bytes(row)))]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB" if size >= 2**20 else f"{size / 2**10:,.1f} KiB"


def make_report(model: str, resolved: Resolved) -> CompileReport:
    """An empty report with what was asked and who set it."""
    return CompileReport(model, dataclasses.asdict(resolved.options), dict(resolved.set_by))


def site_rows(chains: list[ResidualChain], names: dict[int, str]) -> list[SiteRow]:
    """Rows of the widened chains; ``names`` maps id(site) to its hyper-connection's qualified name."""
    return [
        SiteRow(
            chain.index, index, site.module, site.kind, site.where, _shape(site), names.get(id(site), ""), site.learns
        )
        for chain in chains
        for index, site in enumerate(chain.sites)
        if id(site) in names
    ]


def readable(gm: fx.GraphModule) -> str:
    """The graph as text, a line a node, shapes and the user's line where they are known; equal for equal graphs."""
    lines = []
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        shape = f": {_type(value)}" if hasattr(value, "shape") else ""
        where = f"  # {_short(user_line(node))}" if user_line(node) else ""
        lines.append(f"{node.name}{shape} = {_call(node)}{where}")
    return "\n".join(lines)


def _call(node: fx.Node) -> str:
    if node.op in ("placeholder", "output"):
        return node.op if node.op == "placeholder" else f"output({node.args[0]})"
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    if hasattr(node.target, "overloadpacket"):
        target = str(node.target)
    arguments = [str(a) for a in node.args] + [f"{k}={v}" for k, v in node.kwargs.items()]
    return f"{target}({', '.join(arguments)})"


def _type(value: Any) -> str:
    dtype = str(value.dtype).removeprefix("torch.")
    return f"{dtype}[{', '.join(str(s) for s in value.shape)}]"


def _shape(site: ResidualSite) -> str:
    value = site.add.meta.get("example_value")
    return _type(value) if hasattr(value, "shape") else ""


def _short(where: str) -> str:
    """The last two parts of a path: enough to find it, short enough for a table."""
    return "/".join(where.split("/")[-2:])
