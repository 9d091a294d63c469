"""The norm that a branch begins with, in any spelling: what ``mhc::pre_norm`` computes behind the ``pre``.

    RMSNorm    F.rms_norm · x * rsqrt(mean(x^2) + eps) · x / sqrt(...) · pow(..., -0.5)
    LayerNorm  F.layer_norm · (x - mean(x)) * rsqrt(mean((x - mean(x))^2) + eps), also with var(correction=0)

with a weight, ``offset + weight`` and a bias in any order of the factors. Every node from the branch input on is given
the formula it stands for; a node without one (another operation, a rounding that the op does not make) is outside. The
roundings are part of the formula: where the branch input is narrower than float32, everything is computed in float32,
but for the normalised value, which may be rounded before it meets the weight, and the result.

Nothing is changed here; ``passes.fold_norms`` acts on what is found.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from mhc_compile.compat import statically_equal
from mhc_compile.patterns import reading
from mhc_compile.patterns.reading import Op, dtype, is_tensor, read, shape

NARROW = (torch.bfloat16, torch.float16)
WIDE = torch.float32


@dataclasses.dataclass(frozen=True)
class BranchNorm:
    """A norm that alone reads the branch input; attributes as in ``mhc::pre_norm``."""

    kind: str
    eps: float
    offset: float
    round_first: bool
    weight: fx.Node | None
    bias: fx.Node | None
    out: fx.Node
    """The one node that others read; dtype and shape of the branch input."""
    inside: tuple[fx.Node, ...]
    """What goes, in graph order, ``out`` last."""


@dataclasses.dataclass(frozen=True)
class _Form:
    """What a node computes of the branch input u.

    stage   input u · square u^2 or c^2 · mean · centred c = u - mean · moment mean(square) + eps · root · inverse
            1 / root · normal z (offset + weight) + bias.
    eps     None until one was added.
    closed  Rounded after the weight or the bias: nothing may follow.
    """

    stage: str
    kind: str = "rms"
    eps: float | None = None
    first: bool = False
    weight: fx.Node | None = None
    offset: float = 0.0
    bias: fx.Node | None = None
    closed: bool = False


def find(source: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> BranchNorm | str:
    """The norm that alone reads ``source`` (a float tensor [..., C], at most float32 wide), or why there is none."""
    if dtype(source) not in (*NARROW, WIDE):
        return f"its dtype is {_short(dtype(source))}"
    if not isinstance(shape(source)[-1], int):
        return "its hidden size is not known when compiling"
    forms = _Reader(source, is_parameter).forms()
    ends = [node for node, form in forms.items() if form.stage == "normal"]
    if not ends:
        return f"no norm that is known begins there (it is read by {_names(source.users)})"
    if dtype(ends[-1]) != dtype(source):
        return f"the norm's result is {_short(dtype(ends[-1]))}, its input {_short(dtype(source))}"
    reason = ""
    for out in reversed([end for end in ends if dtype(end) == dtype(source)]):
        inside = _region(out, source, forms)
        others = {user for node in (source, *inside[:-1]) for user in node.users} - set(inside)
        if not others:
            form = forms[out]
            affine = form.weight is not None or form.bias is not None
            return BranchNorm(
                form.kind,
                form.eps or 0.0,
                form.offset,
                form.first and affine,
                form.weight,
                form.bias,
                out,
                tuple(inside),
            )
        beside = [other for other in others if source in other.all_input_nodes]
        if beside:
            reason = reason or f"it is read next to the norm as well (by {_names(beside)})"
        reason = reason or f"a value inside of the norm is read elsewhere (by {_names(others)})"
    return reason


def _region(out: fx.Node, source: fx.Node, forms: dict[fx.Node, _Form]) -> list[fx.Node]:
    """The nodes between the branch input and ``out``, in graph order."""
    found, stack = {out}, [out]
    while stack:
        below = {node for node in stack.pop().all_input_nodes if node in forms and node is not source} - found
        found |= below
        stack.extend(below)
    return sorted(found)


def _names(nodes: Any) -> str:
    return ", ".join(dict.fromkeys(_name(node) for node in sorted(nodes))) or "nobody"


def _name(node: fx.Node) -> str:
    return node.op if node.op == "output" else str(getattr(node.target, "__name__", node.target))


def _short(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


class _Reader:
    """Gives every node that is a part of a norm its form."""

    def __init__(self, source: fx.Node, is_parameter: Callable[[fx.Node], bool]) -> None:
        self.source, self.is_parameter = source, is_parameter
        self.width = shape(source)[-1]
        self.narrow = dtype(source)
        self.known: dict[fx.Node, _Form] = {source: _Form("input")}

    def forms(self) -> dict[fx.Node, _Form]:
        """Node -> form, the branch input first, then in graph order."""
        pending = set(self.source.users)
        seen: set[fx.Node] = set()
        while pending:
            node = min(pending)
            pending.remove(node)
            seen.add(node)
            form = self._form(node) if is_tensor(node) else None
            if form is not None:
                self.known[node] = form
                pending |= set(node.users) - seen
        return self.known

    def _form(self, node: fx.Node) -> _Form | None:
        form = self._whole(node) or self._variance(node)
        if form is None:
            op = read(node)
            if op is None or op.inplace:
                return None
            form = self._step(node, op)
        if form is not None and form.stage in ("input", "square", "centred", "normal") and not self._is_full(node):
            return None
        return form

    # --- one call ----------------------------------------------------------------------------------------------------

    def _whole(self, node: fx.Node) -> _Form | None:
        """``layer_norm`` and ``rms_norm``, which compute in float32 and round once."""
        if node.target in (F.layer_norm, torch.layer_norm):
            bound = {"weight": None, "bias": None, "eps": 1e-5} | reading.bind(
                node, "input normalized_shape weight bias eps"
            )
            kind, source, eps, sizes = "layer", bound["input"], bound["eps"], bound["normalized_shape"]
            weight, bias = bound["weight"], bound["bias"]
        else:
            op = read(node)
            if op is None or op.kind != "rms_norm" or op.inplace:
                return None
            kind, (source, weight), eps, bias = "rms", op.args, op.number, None
            sizes = [shape(source)[dim] for dim in op.dims]
        if self._stage(source) != "input" or not isinstance(eps, float | int) or dtype(node) != dtype(source):
            return None
        if not isinstance(sizes, list | tuple) or tuple(sizes) != (self.width,):
            return None
        form: _Form | None = _Form("normal", kind, float(eps))
        for role, value in (("weight", weight), ("bias", bias)):
            if form is not None and value is not None:
                form = self._with(form, role, value)
        if form is None or dtype(node) == WIDE:
            return form
        plain = form.weight is None and form.bias is None
        return dataclasses.replace(form, first=plain, closed=not plain)

    def _variance(self, node: fx.Node) -> _Form | None:
        """The biased variance in one call."""
        if node.target not in ("var", torch.var, torch.Tensor.var):
            return None
        bound = {"keepdim": False, "unbiased": True} | reading.bind(node, "input dim unbiased keepdim")
        biased = bound["unbiased"] is False or bound.get("correction", 1) == 0
        rank = len(shape(self.source))
        dims = bound.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not biased or not bound["keepdim"] or not isinstance(dims, list | tuple) or len(dims) != 1:
            return None
        fits = self._stage(bound["input"]) == "input" and dims[0] % rank == rank - 1 and dtype(node) == WIDE
        return _Form("moment", "layer") if fits else None

    # --- step by step ------------------------------------------------------------------------------------------------

    def _step(self, node: fx.Node, op: Op) -> _Form | None:
        if op.kind in ("cast", "same", "reshape"):
            return self._carried(node, op.args[0])
        forms = [self.known.get(arg) if isinstance(arg, fx.Node) else None for arg in op.args]
        if op.kind in ("add", "mul"):
            for (own, other), form in zip((op.args, op.args[::-1]), forms, strict=True):
                if form is not None and form.stage == "normal":
                    return self._affine(node, "bias" if op.kind == "add" else "weight", form, own, other)
        if dtype(node) != WIDE:
            return None
        by_stage = {form.stage: form for form in forms if form is not None}
        if len(forms) == 1:
            return self._of_one(op, forms[0])
        if op.kind == "add":
            moment, number = by_stage.get("moment"), next((a for a in op.args if isinstance(a, float | int)), None)
            if moment is None or moment.eps is not None or number is None:
                return None
            return dataclasses.replace(moment, eps=float(number))
        stages = [form.stage if form is not None else "" for form in forms]
        if op.kind == "mul" and stages in (["input", "input"], ["centred", "centred"]):
            return self._of_one(dataclasses.replace(op, kind="square"), forms[0])
        if op.kind == "sub":
            return _Form("centred", "layer") if stages == ["input", "mean"] else None
        factor = by_stage.get("inverse") if op.kind == "mul" else forms[1] if op.kind == "div" else None
        if factor is None or factor.stage != ("inverse" if op.kind == "mul" else "root"):
            return None
        of = by_stage.get("input" if factor.kind == "rms" else "centred")
        return _Form("normal", factor.kind, factor.eps) if of is not None else None

    def _of_one(self, op: Op, form: _Form | None) -> _Form | None:
        if form is None:
            return None
        if op.kind == "square" and form.stage in ("input", "centred"):
            return _Form("square", form.kind)
        if op.kind == "mean" and op.keepdim and op.dims == (len(shape(self.source)) - 1,):
            if form.stage in ("input", "square"):
                return _Form("mean" if form.stage == "input" else "moment", form.kind)
            return None
        then = {("moment", "rsqrt"): "inverse", ("moment", "sqrt"): "root", ("root", "reciprocal"): "inverse"}
        stage = then.get((form.stage, op.kind))
        return dataclasses.replace(form, stage=stage) if stage is not None else None

    def _carried(self, node: fx.Node, source: fx.Node) -> _Form | None:
        """Through a cast, a copy, or a view that is none."""
        form = self.known.get(source)
        if form is None or not _same_shape(node, source) or dtype(node) not in (WIDE, self.narrow):
            return None
        if dtype(node) == dtype(source) or form.stage == "input":
            return form  # the branch input is exact in both
        if form.stage != "normal" or form.closed:
            return None
        if dtype(node) == WIDE:
            return form
        plain = form.weight is None and form.bias is None
        return dataclasses.replace(form, first=form.first or plain, closed=not plain)

    def _affine(self, node: fx.Node, role: str, form: _Form, own: fx.Node, other: Any) -> _Form | None:
        """The normalised value times the weight, or plus the bias."""
        if not is_tensor(other) or form.closed:
            return None
        result = self._with(form, role, other)
        if result is None or dtype(node) == WIDE:
            return result
        if not dtype(node) == dtype(own) == dtype(other) == self.narrow:
            return None
        return dataclasses.replace(result, closed=True)

    def _with(self, form: _Form, role: str, node: Any) -> _Form | None:
        """A form with its weight or bias; None where it has one, or where the node is no such parameter."""
        found = self._parameter(node)
        if found is None or form.bias is not None:
            return None
        parameter, offset = found
        if role == "bias":
            return dataclasses.replace(form, bias=parameter) if not offset else None
        return dataclasses.replace(form, weight=parameter, offset=offset) if form.weight is None else None

    def _parameter(self, node: Any) -> tuple[fx.Node, float] | None:
        """(w, offset) of a parameter [C], possibly cast to a type that holds it, possibly ``offset + w`` in float32."""
        if not is_tensor(node) or node in self.known:
            return None
        if self.is_parameter(node):
            return (node, 0.0) if shape(node) == (self.width,) and dtype(node) in (*NARROW, WIDE) else None
        op = read(node)
        if op is None or op.inplace:
            return None
        if op.kind in ("same", "reshape") or (op.kind == "cast" and reading.is_lossless(node, op.args[0])):
            same = shape(node)[-1:] == (self.width,) and all(size == 1 for size in shape(node)[:-1])
            return self._parameter(op.args[0]) if same else None
        number = next((arg for arg in op.args if isinstance(arg, float | int)), None)
        if op.kind != "add" or number is None or dtype(node) != WIDE:
            return None
        found = self._parameter(op.nodes[0]) if op.nodes else None
        return (found[0], float(number)) if found is not None and not found[1] else None

    def _stage(self, node: Any) -> str:
        form = self.known.get(node) if isinstance(node, fx.Node) else None
        return form.stage if form is not None else ""

    def _is_full(self, node: fx.Node) -> bool:
        return _same_shape(node, self.source)


def _same_shape(a: fx.Node, b: fx.Node) -> bool:
    return len(shape(a)) == len(shape(b)) and all(map(statically_equal, shape(a), shape(b)))
