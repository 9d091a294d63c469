"""One canonical reading of a node, whatever its spelling.

``x.sum(-1)``, ``torch.sum(x, dim=-1)``, ``aten.sum.dim_IntList(x, [-1])``, ``einsum("...i->...", x)`` mean one thing.
``read`` turns a node of Dynamo's torch-level graph into an ``Op``: a kind out of a small set, its operands (nodes or
numbers), and the axes it acts on as non-negative positions. A node that is not in the table reads as None and is a leaf
for every pattern. Nothing is executed and nothing is changed here.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mhc_compile.patterns.memo import remembered

UNARY = frozenset("exp log sigmoid abs rsqrt sqrt square reciprocal neg relu tanh silu softplus detach".split())
REDUCTIONS = frozenset(["sum", "mean", "amax", "logsumexp", "norm"])
SHAPELESS = (
    frozenset(("same", "cast", "softmax", "log_softmax", "normalize", "clamp_min", "rms_norm", "sinkhorn")) | UNARY
)
"""Kinds whose result has the axes of their first operand."""


@dataclass(frozen=True)
class Op:
    """What a node means.

    kind     one of the names used below (``add``, ``sum``, ``reshape`` ...).
    args     operands: nodes, or python numbers.
    dims     axes reduced, normalised, permuted or sliced (non-negative positions of the first operand).
    number   the scalar attribute: clamp bound, order of a norm, eps of a normalisation.
    equation input and output labels of an einsum, one string per operand, the output last.
    start, length   the part that a slice takes along its axis.
    inplace  the node writes into its first operand.
    """

    kind: str
    args: tuple[Any, ...]
    dims: tuple[int, ...] = ()
    keepdim: bool = False
    number: float | None = None
    equation: tuple[str, ...] = ()
    start: int = 0
    length: int = 0
    inplace: bool = False

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The operands that are tensors of the graph."""
        return tuple(arg for arg in self.args if isinstance(arg, fx.Node))


def value(node: Any) -> Any:
    """The fake value of a node, the argument itself if it is no node, None where the graph does not say."""
    return node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else node


def is_tensor(node: Any) -> bool:
    """True for a node that stands for one tensor."""
    return isinstance(node, fx.Node) and isinstance(value(node), torch.Tensor)


def shape(node: fx.Node) -> tuple[Any, ...]:
    """Sizes of a tensor node: ints or SymInts."""
    return tuple(value(node).shape)


def dtype(node: fx.Node) -> torch.dtype:
    """Element type of a tensor node."""
    return value(node).dtype


_HOLDS = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1, torch.float64: 2}


def is_lossless(node: fx.Node, source: fx.Node) -> bool:
    """True if the cast from ``source`` to ``node`` keeps every value (equal or wider floating type)."""
    a, b = dtype(source), dtype(node)
    return a == b or (a in _HOLDS and b in _HOLDS and _HOLDS[a] < _HOLDS[b])


# --- which function is called ----------------------------------------------------------------------------------------

_SIGNATURES: dict[str, tuple[str, str]] = {
    # name in torch: (kind, names of its parameters in order)
    **{name: (name, "input") for name in UNARY},
    **{name: (name, "input other") for name in ("add", "sub", "mul", "div", "pow", "matmul", "rsub")},
    **dict.fromkeys(("bmm", "mm", "mv"), ("matmul", "input mat2")),
    **dict.fromkeys(["view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"], ("view", "input")),
    **dict.fromkeys(("contiguous", "clone", "identity", "alias"), ("same", "input")),
    **dict.fromkeys(["to", "float", "double", "half", "bfloat16", "type", "type_as"], ("cast", "input")),
    **{name: (name, "input dim keepdim") for name in ("sum", "mean", "amax", "logsumexp")},
    **dict.fromkeys(("transpose", "swapaxes", "swapdims"), ("transpose", "input dim0 dim1")),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), ("expand", "input")),
    **dict.fromkeys(("clamp", "clip"), ("clamp", "input min max")),
    **dict.fromkeys(("split", "chunk", "tensor_split", "split_with_sizes"), ("pieces", "input size dim")),
    **{name: (kind, "input") for name, kind in (("absolute", "abs"), ("negative", "neg"), ("expit", "sigmoid"))},
    "multiply": ("mul", "input other"),
    "subtract": ("sub", "input other"),
    **dict.fromkeys(("divide", "truediv", "true_divide"), ("div", "input other")),
    "clamp_min": ("clamp", "input min"),
    "norm": ("norm", "input p dim keepdim"),
    "vector_norm": ("norm", "x ord dim keepdim"),
    "permute": ("permute", "input"),
    "t": ("t", "input"),
    "softmax": ("softmax", "input dim"),
    "log_softmax": ("log_softmax", "input dim"),
    "normalize": ("normalize", "input p dim eps"),
    "rms_norm": ("rms_norm", "input normalized_shape weight eps"),
    "linear": ("linear", "input weight bias"),
    "einsum": ("einsum", "equation"),
    "addcmul": ("addcmul", "input tensor1 tensor2 value"),
    "baddbmm": ("baddbmm", "input batch1 batch2 beta alpha"),
    "narrow": ("narrow", "input dim start length"),
    "unbind": ("pieces", "input dim"),
    "max": ("pieces", "input dim keepdim"),
    "repeat": ("repeat", "input"),
    "stack": ("stack", "tensors dim"),
    "getitem": ("getitem", "input index"),
    "getattr": ("getattr", "input name"),
    "mhc::sinkhorn": ("sinkhorn", "input"),
}

_SYNONYMS = {"matmul": "matmul", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv", "ipow": "pow"}


def _callables() -> dict[Callable[..., Any], str]:
    table: dict[Callable[..., Any], str] = {}
    for space in (torch.Tensor, torch.special, torch.linalg, F, torch, operator):
        for name in _SIGNATURES:
            function = getattr(space, name, None)
            if callable(function):
                table[function] = name
    table[getattr] = "getattr"
    for name, plain in _SYNONYMS.items():
        table[getattr(operator, name)] = plain
    return table


_CALLABLES = _callables()
_INPLACE = {getattr(operator, name) for name in _SYNONYMS if name.startswith("i")}


def called_name(node: fx.Node) -> tuple[str, bool]:
    """(bare name of what a node calls, True if it writes in place); an empty name if it is not in the table."""
    target = node.target
    inplace = target in _INPLACE or node.kwargs.get("out") is not None
    if node.op == "call_method":
        name = str(target)
    elif node.op != "call_function":
        return "", False
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name.removeprefix("aten::")
    else:
        name = _CALLABLES.get(target, "") if callable(target) else ""
        if not name and getattr(target, "__name__", "").endswith("_"):
            name = target.__name__  # type: ignore[union-attr]  # torch.sigmoid_ and the like
    if name.endswith("_") and not name.endswith("__"):
        name, inplace = name[:-1], True
    return (name, inplace) if name in _SIGNATURES else ("", inplace)


def writes(node: fx.Node) -> bool:
    """True for a node that writes into its first argument, whether the table knows it or not."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return node.target in _INPLACE or node.target is operator.setitem or node.kwargs.get("out") is not None


# --- what it means ---------------------------------------------------------------------------------------------------


def bind(node: fx.Node, parameters: str) -> dict[str, Any]:
    """The arguments of a node by the names of its function's parameters, in the order they are given."""
    names = parameters.split()
    bound = dict(zip(names, map(_known, node.args), strict=False))
    bound.update({name: _known(argument) for name, argument in node.kwargs.items()})
    for alias, name in (("axis", "dim"), ("self", names[0]), ("a", names[0]), ("input", names[0])):
        if alias in bound and alias != name:
            bound.setdefault(name, bound.pop(alias))
    return bound


def _known(argument: Any) -> Any:
    """A python float that Dynamo made an input (``dynamic=True``) counts as the number it is: see ``pin_floats``."""
    fake = value(argument)
    if isinstance(fake, torch.SymFloat) and fake.node.hint is not None:
        return float(fake.node.hint)
    return argument


def pin_floats(nodes: Iterable[fx.Node]) -> None:
    """Guard the floats that were read as numbers: another eps compiles again."""
    for node in nodes:
        fake = value(node)
        if isinstance(fake, torch.SymFloat) and fake.node.hint is not None:
            float(fake)  # installs the guard


def _positive(dims: Any, rank: int) -> tuple[int, ...]:
    if dims is None:
        return tuple(range(rank))
    listed = dims if isinstance(dims, list | tuple) else (dims,)
    return tuple(sorted(d % rank for d in listed)) if rank else ()


def _is_number(argument: Any) -> bool:
    return isinstance(argument, int | float) and not isinstance(argument, bool)


@remembered
def read(node: fx.Node) -> Op | None:
    """The meaning of a node; None if it is not in the table or uses an option that the patterns do not know."""
    name, inplace = called_name(node)
    if not name:
        return None
    kind, parameters = _SIGNATURES[name]
    reader = _READERS.get(kind, _read_unary if kind in UNARY or kind in ("same", "cast", "sinkhorn") else None)
    if reader is None:
        return None
    try:
        op = reader(node, kind, bind(node, parameters))
    except (KeyError, IndexError, TypeError, ValueError):
        return None  # a form of the arguments that torch takes and this table does not know
    if op is None or not inplace:
        return op
    return Op(**{**op.__dict__, "inplace": True})


def _read_unary(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source = bound.get("input")
    if not (is_tensor(node) and is_tensor(source)):
        return None
    assert isinstance(source, fx.Node)
    if kind == "cast" and not (dtype(node).is_floating_point and dtype(source).is_floating_point):
        return None
    return Op(kind, (source,))


def _read_binary(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    a, b = bound.get("input"), bound.get("other")
    if bound.get("alpha", 1) != 1 or bound.get("rounding_mode") is not None or not is_tensor(node):
        return None
    if not all(is_tensor(x) or _is_number(x) for x in (a, b)):
        return None
    if kind == "rsub":
        kind, a, b = "sub", b, a
    if kind == "mul" and a is b:
        return Op("square", (a,))
    if kind == "div" and _is_number(a) and a == 1:
        return Op("reciprocal", (b,))
    return Op(kind, (a, b))


_POWERS = {2: "square", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}


def _read_pow(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    a, b = bound.get("input"), bound.get("other", bound.get("exponent"))
    power = _POWERS.get(float(b)) if isinstance(b, int | float) else None
    return Op(power, (a,)) if power and is_tensor(a) else None


def _read_view(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source = bound["input"]
    if not (is_tensor(node) and is_tensor(source)) or dtype(node) != dtype(source):
        return None
    return Op("reshape", (source,))


def _read_permute(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source = bound["input"]
    if not is_tensor(source):
        return None
    rank = value(source).dim()
    order = list(range(rank))
    if kind == "permute":
        listed = bound.get("dims", node.args[1:])
        listed = listed[0] if len(listed) == 1 and isinstance(listed[0], list | tuple) else listed
        order = [d % rank for d in listed]
    else:
        i, j = (bound["dim0"], bound["dim1"]) if kind == "transpose" else (-1, -2)
        if rank >= 2:
            order[i % rank], order[j % rank] = order[j % rank], order[i % rank]
    return Op("permute", (source,), dims=tuple(order))


def _read_attribute(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    if bound.get("name") == "mT" or (bound.get("name") == "T" and is_tensor(node) and value(node).dim() == 2):
        return _read_permute(node, "t", bound)
    return None


def _read_reduction(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source = bound.get("input", bound.get("x"))
    if not (is_tensor(node) and is_tensor(source)):
        return None
    order = bound.get("p", bound.get("ord", 2)) if kind == "norm" else None
    if kind == "norm" and not _is_number(order):
        order = {"fro": 2, None: 2}.get(order)
        if order is None:
            return None
    dims = _positive(bound.get("dim"), value(source).dim())
    return Op(kind, (source,), dims=dims, keepdim=bool(bound.get("keepdim", False)), number=order)


def _read_along(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source, dim = bound.get("input"), bound.get("dim", 1 if kind == "normalize" else None)
    if not (is_tensor(source) and isinstance(dim, int)):
        return None
    number = None
    if kind == "normalize":
        if bound.get("p", 2.0) != 1:
            return None
        number = float(bound.get("eps", 1e-12))
    return Op(kind, (source,), dims=_positive(dim, value(source).dim()), number=number)


def _read_clamp(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    bound_below = bound.get("min")
    if not _is_number(bound_below) or bound.get("max") is not None or not is_tensor(bound["input"]):
        return None
    assert isinstance(bound_below, int | float)
    return Op("clamp_min", (bound["input"],), number=float(bound_below))


def _read_product(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    if kind == "linear":
        args = (bound["input"], bound["weight"], bound.get("bias"))
        return Op(kind, args) if is_tensor(args[0]) and is_tensor(args[1]) else None
    operands = (bound["input"], bound.get("mat2", bound.get("other", bound.get("tensor2", bound.get("vec")))))
    if not all(is_tensor(x) and value(x).dim() >= 2 for x in operands):
        return None
    return Op("matmul", operands)


def _read_einsum(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    equation = bound.get("equation")
    operands = node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation or not all(is_tensor(x) for x in operands):
        return None
    inputs, output = equation.replace(" ", "").split("->")
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    terms, widest = [], 0
    for term, operand in zip(inputs.split(","), operands, strict=False):
        hidden = value(operand).dim() - len(term.replace("...", ""))
        widest = max(widest, hidden)
        # The labels behind "..." are aligned from the right, as broadcasting is.
        terms.append(term.replace("...", "".join(spare[:hidden][::-1])))
    terms.append(output.replace("...", "".join(spare[:widest][::-1])))
    if len(terms) != len(operands) + 1 or any(len(set(term)) != len(term) for term in terms):
        return None
    return Op(kind, tuple(operands), equation=tuple(terms))


def _read_fused(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    if any(bound.get(name, 1) != 1 for name in ("value", "beta", "alpha")):
        return None
    first, second = ("tensor1", "tensor2") if kind == "addcmul" else ("batch1", "batch2")
    args = (bound.get("input"), bound.get(first), bound.get(second))
    return Op(kind, args) if all(is_tensor(x) for x in args) else None


def _read_rms_norm(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source, sizes = bound.get("input"), bound.get("normalized_shape")
    if not (is_tensor(source) and isinstance(sizes, list | tuple) and _is_number(bound.get("eps"))):
        return None
    rank = value(source).dim()
    dims = tuple(range(rank - len(sizes), rank))
    return Op(kind, (source, bound.get("weight")), dims=dims, number=float(bound["eps"]))


def _read_narrow(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source, start, length = bound["input"], bound.get("start"), bound.get("length")
    if not (is_tensor(source) and isinstance(start, int) and isinstance(length, int)):
        return None
    (dim,) = _positive(bound["dim"], value(source).dim())
    return Op("slice", (source,), dims=(dim,), start=start, length=length)


def _read_item(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source, index = bound["input"], bound["index"]
    if isinstance(source, fx.Node) and isinstance(value(source), tuple | list) and isinstance(index, int):
        return _read_piece(source, index)
    if not (is_tensor(source) and is_tensor(node)):
        return None
    indices = list(index) if isinstance(index, tuple | list) else [index]
    if any(not (i is None or i is Ellipsis or isinstance(i, slice)) for i in indices):
        return None
    cuts = [i for i in indices if isinstance(i, slice) and i != slice(None)]
    if not cuts:
        return Op("reshape", (source,))
    if len(cuts) > 1 or None in indices or cuts[0].step not in (None, 1):
        return None
    place = indices.index(cuts[0])
    dim = place - len(indices) if Ellipsis in indices[:place] else place
    (dim,) = _positive(dim, value(source).dim())
    start, length = cuts[0].start or 0, shape(node)[dim]
    size = shape(source)[dim]
    if not all(isinstance(x, int) for x in (start, length, size)):
        return None
    return Op("slice", (source,), dims=(dim,), start=start % size if start < 0 else start, length=length)


def _read_piece(pieces: fx.Node, index: int) -> Op | None:
    """One result of split or chunk is a slice; the values of ``max`` along an axis are its maximum."""
    name, _ = called_name(pieces)
    if name not in ("split", "chunk", "tensor_split", "split_with_sizes", "max"):
        return None
    bound = bind(pieces, _SIGNATURES[name][1])
    source = bound["input"]
    dims = _positive(bound.get("dim", 0), value(source).dim())
    if name == "max":
        keepdim = bool(bound.get("keepdim", False))
        return Op("amax", (source,), dims=dims, keepdim=keepdim) if index == 0 and "dim" in bound else None
    sizes = [piece.shape[dims[0]] for piece in value(pieces)]
    index %= len(sizes)
    if not all(isinstance(size, int) for size in sizes):
        return None
    return Op("slice", (source,), dims=dims, start=sum(sizes[:index]), length=sizes[index])


def _read_repeat(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    source = bound.get("input")
    return Op(kind, (source,)) if is_tensor(source) and is_tensor(node) else None


def _read_stack(node: fx.Node, kind: str, bound: dict[str, Any]) -> Op | None:
    tensors = bound.get("tensors")
    if not isinstance(tensors, list | tuple) or len(set(tensors)) != 1 or not is_tensor(tensors[0]):
        return None
    return Op(kind, (tensors[0],), dims=_positive(bound.get("dim", 0), value(node).dim()), length=len(tensors))


_READERS: dict[str, Callable[[fx.Node, str, dict[str, Any]], Op | None]] = {
    **dict.fromkeys(("add", "sub", "mul", "div", "rsub"), _read_binary),
    **dict.fromkeys(("permute", "transpose", "t"), _read_permute),
    **dict.fromkeys(REDUCTIONS, _read_reduction),
    **dict.fromkeys(("softmax", "log_softmax", "normalize"), _read_along),
    **dict.fromkeys(("matmul", "linear"), _read_product),
    **dict.fromkeys(("addcmul", "baddbmm"), _read_fused),
    **dict.fromkeys(("repeat", "expand"), _read_repeat),
    "pow": _read_pow,
    "view": _read_view,
    "getattr": _read_attribute,
    "clamp": _read_clamp,
    "einsum": _read_einsum,
    "rms_norm": _read_rms_norm,
    "narrow": _read_narrow,
    "getitem": _read_item,
    "stack": _read_stack,
}


# --- looking through what does not compute ---------------------------------------------------------------------------


def is_plumbing(node: Any, op: Op | None = None) -> bool:
    """True for views, permutations, copies and casts that keep every value: they change no number."""
    op = op or read(node)
    if op is None or op.inplace:
        return False
    return op.kind in ("reshape", "permute", "same") or (op.kind == "cast" and is_lossless(node, op.args[0]))


def strip(node: fx.Node, *, expand: bool = False) -> fx.Node:
    """The node under views, copies and harmless casts (and broadcasts, if asked)."""
    while True:
        op = read(node)
        if op is None or not (is_plumbing(node, op) or (expand and op.kind == "expand")):
            return node
        node = op.args[0]
