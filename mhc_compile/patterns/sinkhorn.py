"""Sinkhorn: a positive matrix, then alternating normalisations of its rows and columns, unrolled in the graph.

The matcher starts at the last normalisation and walks back one step at a time (whatever the spelling of a step),
names the axis each step sums over, and rolls the steps up into a ``SinkhornSpec``: positivity, first axis, number of
half steps, eps. Each of these is read off the graph; none is guessed from the numbers, which cannot tell 39 steps
from 40 after convergence.

    one step      x / sum(x) · x / (sum(x) + eps) · x / sum(x).clamp(min=eps) · x * (1 / sum(x)) · F.normalize(x, p=1)
    in log space  x - logsumexp(x) · log_softmax(x)          ... and one exp at the end
    positivity    softmax(x) [+ eps] · exp(x) · exp(x - rowmax(x)) · |x| + eps · log space
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import fx

from mhc_compile import ops
from mhc_compile.ops.spec import SinkhornSpec
from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import Axes, Dims, flat, without
from mhc_compile.patterns.base import MAX_STREAMS, Candidate, Editor, Refused, arrange, in_dtype
from mhc_compile.patterns.reading import Op, read, strip

WHAT = "sinkhorn"
FEWEST = 2
"""Normalisations that make a chain (a softmax counts as one): fewer is an ordinary normalisation."""


@dataclass(frozen=True)
class Step:
    """One normalisation of ``source``: ``node`` is its result, the axes of ``total`` lack the normalised one."""

    node: fx.Node
    source: fx.Node
    total: fx.Node | None
    dims: tuple[int, ...] = ()
    eps: float = 0.0
    mode: str = "add"
    log: bool = False


@dataclass(frozen=True)
class Start:
    """How the chain begins: positivity, the node of the logits, and the axis of a softmax or of a row maximum."""

    positivity: str
    logits: fx.Node
    eps: float = 0.0
    along: fx.Node | None = None
    dims: tuple[int, ...] = ()


# --- one step --------------------------------------------------------------------------------------------------------


def read_step(node: fx.Node) -> Step | None:
    """The normalisation that a node completes, None if it is none."""
    op = read(node)
    if op is None or not op.nodes:
        return None
    if op.kind == "normalize":
        return Step(node, op.args[0], None, op.dims, op.number or 0.0, "clamp")
    if op.kind == "log_softmax":
        return Step(node, op.args[0], None, op.dims, log=True)
    if op.kind in ("div", "mul") and len(op.nodes) == 2:
        for source, other in (op.args, op.args[::-1]) if op.kind == "mul" else (op.args,):
            divisor = other if op.kind == "div" else _reciprocal(other)
            found = None if divisor is None else _read_divisor(divisor, source)
            if found is not None:
                total, eps, mode = found
                return Step(node, source, total, (), eps, mode)
    if op.kind == "sub" and len(op.nodes) == 2:
        total = strip(op.args[1])
        inner = read(total)
        if inner is not None and inner.kind == "logsumexp" and strip(inner.args[0]) is strip(op.args[0]):
            return Step(node, op.args[0], op.args[1], log=True)
    return None


def _reciprocal(node: fx.Node) -> fx.Node | None:
    op = read(strip(node))
    return op.args[0] if op is not None and op.kind == "reciprocal" and op.nodes else None


def _read_divisor(node: fx.Node, source: fx.Node) -> tuple[fx.Node, float, str] | None:
    """(node with the axes of the divisor, eps, mode) if the node is the sum of ``source`` along something [+ eps]."""
    eps, mode, current = 0.0, "add", strip(node, expand=True)
    op = read(current)
    if op is not None and op.kind == "add" and len(op.nodes) == 1:
        eps = float(next(x for x in op.args if not isinstance(x, fx.Node)))
        current = strip(op.nodes[0], expand=True)
    elif op is not None and op.kind == "clamp_min":
        eps, mode, current = op.number or 0.0, "clamp", strip(op.args[0], expand=True)
    op = read(current)
    summed = op is not None and (op.kind == "sum" or _is_sum(op) or (op.kind == "norm" and op.number == 1))
    if op is None or not summed or strip(op.args[0]) is not strip(source):
        return None
    while (outer := read(node)) is not None and outer.kind in ("expand", "same"):
        node = outer.args[0]  # an explicit broadcast is aligned as an implicit one would be
    return node, eps, mode


def _is_sum(op: Op) -> bool:
    """An einsum of one operand that leaves an axis out."""
    return op.kind == "einsum" and len(op.args) == 1 and set(op.equation[1]) < set(op.equation[0])


# --- the chain -------------------------------------------------------------------------------------------------------


def _walk(end: fx.Node) -> tuple[list[Step], fx.Node]:
    """The steps that end in a node, first step first, and the node that they start from."""
    steps: list[Step] = []
    current = end
    while True:
        step = read_step(strip(current))
        if step is None or (steps and step.log != steps[-1].log):
            return steps[::-1], current
        steps.append(step)
        current = step.source


def _read_start(node: fx.Node) -> Start | None:
    """The positive matrix that the first step normalises."""
    current, eps = strip(node), 0.0
    op = read(current)
    if op is not None and op.kind == "add" and len(op.nodes) == 1:
        eps = float(next(x for x in op.args if not isinstance(x, fx.Node)))
        current = strip(op.nodes[0])
        op = read(current)
    if op is None:
        return None
    if op.kind == "softmax":
        return Start("softmax", op.args[0], eps, op.args[0], op.dims)
    if op.kind == "abs":
        return Start("abs", op.args[0], eps)
    if op.kind == "exp":
        inner = strip(op.args[0])
        shifted = read(inner)
        if shifted is not None and shifted.kind == "sub" and len(shifted.nodes) == 2:
            largest = strip(shifted.args[1])
            detached = read(largest)
            largest = strip(detached.args[0]) if detached is not None and detached.kind == "detach" else largest
            maximum = read(largest)
            if maximum is not None and maximum.kind == "amax" and strip(maximum.args[0]) is strip(shifted.args[0]):
                return Start("exp_rowmax", shifted.args[0], eps, maximum.args[0], maximum.dims)
        return Start("exp", op.args[0], eps)
    return None


def _normalised_axis(axes: Axes, step: Step, before: Dims) -> int:
    """The one axis that a step sums over; Refused if it is none or several, or the divisor is misaligned."""
    if step.total is None:
        gone = flat(tuple(axes.dims(step.source)[i] for i in step.dims))
    else:
        after = axes.dims(step.total)
        source = axes.dims(step.source)
        padded = ((),) * (len(source) - len(after)) + after
        if any(b and b != a for a, b in zip(source, padded, strict=True)):
            raise Refused(WHAT, "a step divides by sums along a different axis than it broadcasts over", step.node)
        gone = flat(tuple(a for a, b in zip(source, padded, strict=True) if a and not b))
    if len(gone) != 1:
        raise Refused(WHAT, f"a step normalises {len(gone)} axes at once instead of one", step.node)
    return gone[0]


@dataclass(frozen=True)
class Reading:
    """A whole chain: its attributes, its ends, and the names of its axes."""

    spec: SinkhornSpec
    logits: fx.Node
    end: fx.Node
    axes: Axes
    canonical: Dims
    """Axes of the logits with the two of the matrix last, as the op wants them."""


def read_chain(end: fx.Node) -> Reading | None:
    """Roll up the chain that ends in a node. None if there is none, Refused if it is almost one."""
    op = read(end)
    log = op is not None and op.kind == "exp"
    steps, first = _walk(op.args[0] if log and op is not None else end)
    if not steps or steps[-1].log != log:
        return None
    _refuse_rounding(strip(first), steps)
    start = Start("log", first) if log else _read_start(first)
    count = len(steps) + (start is not None and start.positivity == "softmax")
    if count < FEWEST:
        return None
    if start is None:
        name, _ = reading.called_name(strip(first))
        reason = f"the matrix comes from `{name or strip(first).target}`, which is no known positivity"
        raise Refused(WHAT, reason, steps[0].node)
    axes = Axes()
    root = axes.pin(start.logits)
    normalised = []
    for step in steps:
        normalised.append(_normalised_axis(axes, step, root))
        axes.pin(step.node, axes.dims(step.source))
    found = _specify(axes, steps, start, [axes.resolve((a,))[0] for a in normalised])
    return None if found is None else Reading(found[0], start.logits, end, axes, found[1])


def _refuse_rounding(first: fx.Node, steps: Sequence[Step]) -> None:
    """A cast that loses digits between two steps is part of what the chain computes, and no attribute of the op."""
    op = read(first)
    if op is not None and op.kind == "cast" and read_step(strip(op.args[0])) is not None:
        raise Refused(WHAT, f"the matrix is rounded to {reading.dtype(first)} between two steps", steps[0].node)


def _specify(
    axes: Axes, steps: Sequence[Step], start: Start, normalised: list[int]
) -> tuple[SinkhornSpec, Dims] | None:
    """The attributes of a chain whose steps normalise these axes; Refused where they do not make one, None for an
    ordinary normalisation of one axis."""
    dims = axes.dims(start.logits)
    along = flat(tuple(axes.dims(start.along)[i] for i in start.dims)) if start.along is not None else ()
    matrix = sorted({*normalised, *along}, key=flat(dims).index)
    if len(matrix) < 2:
        return None
    for before, (a, b) in enumerate(itertools.pairwise(normalised), 1):
        if a == b:
            raise Refused(WHAT, f"steps {before} and {before + 1} normalise the same axis", steps[before].node)
    if len(matrix) != 2 or len(along) > 1:
        raise Refused(WHAT, f"the steps and the positivity act on {len(matrix)} axes instead of two", steps[0].node)
    sizes = [axes.size(atom) for atom in matrix]
    if sizes[0] != sizes[1] or not isinstance(sizes[0], int):
        raise Refused(WHAT, f"the matrix is not square ({sizes[0]} x {sizes[1]})", steps[0].node)
    if sizes[0] > MAX_STREAMS:
        raise Refused(WHAT, f"a {sizes[0]} x {sizes[0]} matrix mixes no streams (at most {MAX_STREAMS})", steps[0].node)
    for index, step in enumerate(steps):
        if (step.eps, step.mode if step.eps else "add") != (steps[0].eps, steps[0].mode if steps[0].eps else "add"):
            reason = f"step {index + 1} has another eps ({step.eps:g}) than step 1 ({steps[0].eps:g})"
            raise Refused(WHAT, reason, step.node)
        if reading.dtype(step.node) != reading.dtype(steps[0].node):
            raise Refused(WHAT, f"step {index + 1} changes the dtype to {reading.dtype(step.node)}", step.node)
    row = along[0] if along else matrix[1]
    column = matrix[0] if row == matrix[1] else matrix[1]
    spec = SinkhornSpec(
        positivity=start.positivity,  # type: ignore[arg-type]  # one of the literals by construction
        positive_eps=start.eps,
        first="row" if normalised[0] == row else "column",
        steps=len(steps),
        eps=steps[0].eps,
        eps_mode=steps[0].mode if steps[0].eps else "add",  # type: ignore[arg-type]  # "add" or "clamp"
    )
    return spec, (*without(dims, matrix), (column,), (row,))


# --- find and replace ------------------------------------------------------------------------------------------------


def find(graph: fx.Graph) -> Iterator[Candidate | Refused]:
    """Every maximal chain of a graph, or why what looks like one is none."""
    inside: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in inside or node.op not in ("call_function", "call_method"):
            continue
        op = read(node)
        log = op is not None and op.kind == "exp" and isinstance(op.args[0], fx.Node)
        steps, _ = _walk(op.args[0] if log and op is not None else node)
        if strip(node) is not node or not steps or steps[-1].log != log:
            continue
        inside.update(step.node for step in steps)
        try:
            chain = read_chain(node)
        except Refused as refusal:
            yield refusal
            continue
        if chain is not None:
            yield candidate(chain)


def candidate(chain: Reading) -> Candidate:
    """The op that a chain becomes."""
    out = chain.axes.dims(chain.end)

    def build(edit: Editor) -> tuple[fx.Node, ...]:
        matrix = arrange(edit, chain.axes, chain.logits, chain.axes.dims(chain.logits), chain.canonical)
        result = edit.call(ops.sinkhorn.overload, matrix, **chain.spec.op_arguments())
        return (in_dtype(edit, arrange(edit, chain.axes, result, chain.canonical, out), reading.dtype(chain.end)),)

    return Candidate(WHAT, (chain.end,), (chain.logits,), build, attributes={"spec": chain.spec})
