"""Named axes: which axis of one tensor is which axis of another, whatever the layout.

``(pre.unsqueeze(-1) * X).sum(2)``, ``einsum("bsn,bsnc->bsc", pre, X)`` and ``(pre.unsqueeze(-2) @ X).squeeze(-2)`` are
one contraction once the axes have names. An *atom* is an axis that is never taken apart; a dimension of a tensor is a
tuple of atoms (two after a flatten, none for size 1). ``Axes`` names the atoms of a few pinned leaves and follows
them through views, permutations, broadcasts, reductions and products. Atoms that meet in an element-wise operation
become one; an atom that a view cuts in two is cut everywhere. Sizes may be symbolic: they are compared as
expressions, no guard is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mhc_compile.patterns import reading
from mhc_compile.patterns.reading import Op

Dim = tuple[int, ...]
Dims = tuple[Dim, ...]


def expression(size: Any) -> Any:
    """A size as an int or a sympy expression."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        return int(expr) if expr.is_Integer else expr
    return size


def quotient(a: Any, b: Any) -> Any | None:
    """a / b if it is an integer whatever the symbols are, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    result = sympy.cancel(sympy.sympify(a) / sympy.sympify(b))
    if sympy.denom(result) != 1:
        return None
    return int(result) if result.is_Integer else result


class Axes:
    """The names of the axes around one match. Sizes of atoms are ints or sympy expressions."""

    def __init__(self) -> None:
        self._size: list[Any] = []
        self._parts: dict[int, tuple[int, ...]] = {}
        self._known: dict[fx.Node, Dims] = {}

    # --- atoms -------------------------------------------------------------------------------------------------------

    def new(self, size: Any) -> int:
        """A new atom of a size."""
        self._size.append(size)
        return len(self._size) - 1

    def size(self, atom: int) -> Any:
        """Size of an atom."""
        return self._size[atom]

    def resolve(self, dim: Dim) -> Dim:
        """The atoms of a dimension after all that was learned since."""
        while any(atom in self._parts for atom in dim):
            dim = tuple(part for atom in dim for part in self._parts.get(atom, (atom,)))
        return dim

    def _unify(self, a: Dim, b: Dim) -> bool:
        """Make two dimensions one; False if their sizes cannot be matched."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            x, y = left[0], right[0]
            if x != y:
                if self._size[x] == self._size[y]:
                    self._parts[y] = (x,)
                elif (rest := quotient(self._size[x], self._size[y])) is not None:
                    self._parts[x] = (y, self.new(rest))
                elif (rest := quotient(self._size[y], self._size[x])) is not None:
                    self._parts[y] = (x, self.new(rest))
                else:
                    return False
                left, right = list(self.resolve(tuple(left))), list(self.resolve(tuple(right)))
            left, right = left[1:], right[1:]
        return not left and not right

    def split_like(self, dims: Dims, sizes: Sequence[Sequence[Any]]) -> Dims:
        """The same dimensions with their atoms cut to the given sizes, where they can be."""
        out: list[Dim] = []
        for dim, wanted in zip(dims, sizes, strict=False):
            cut: Dim = tuple(self.new(size) for size in wanted)
            out.append(self.resolve(dim if not self._unify(dim, cut) else cut))
        return tuple(self.resolve(dim) for dim in out)

    # --- tensors -----------------------------------------------------------------------------------------------------

    def fresh(self, node: fx.Node) -> Dims:
        """New names for every axis of a tensor that is larger than 1."""
        sizes = [expression(size) for size in reading.shape(node)]
        return tuple(() if size == 1 else (self.new(size),) for size in sizes)

    def pin(self, node: fx.Node, dims: Dims | None = None) -> Dims:
        """Declare a node a leaf, with given or new names."""
        if dims is not None or node not in self._known:
            self._known[node] = self.fresh(node) if dims is None else dims
        return self.dims(node)

    def dims(self, node: fx.Node) -> Dims:
        """The named axes of a node, followed down to the pinned leaves; unknown operations are leaves too."""
        if node not in self._known:
            op = reading.read(node)
            found = None if op is None else self._follow(node, op)
            self._known[node] = self.fresh(node) if found is None else found
        return tuple(self.resolve(dim) for dim in self._known[node])

    def atoms(self, node: fx.Node) -> tuple[int, ...]:
        """All atoms of a node, in order."""
        return flat(self.dims(node))

    def _follow(self, node: fx.Node, op: Op) -> Dims | None:
        kind = op.kind
        if kind in reading.SHAPELESS:
            return self.dims(op.args[0])
        if kind == "permute":
            dims = self.dims(op.args[0])
            return tuple(dims[i] for i in op.dims)
        if kind == "reshape":
            return self._regroup(self.dims(op.args[0]), [expression(s) for s in reading.shape(node)])
        if kind == "expand":
            return self._broadcast(node, [self.dims(op.args[0])])
        if kind in ("add", "sub", "mul", "div"):
            return self._broadcast(node, [self.dims(x) for x in op.nodes])
        if kind == "addcmul":
            return self._broadcast(node, [self.dims(x) for x in op.nodes])
        if kind in reading.REDUCTIONS:
            dims = self.dims(op.args[0])
            return tuple(() if i in op.dims else dim for i, dim in enumerate(dims) if op.keepdim or i not in op.dims)
        if kind == "slice":
            dims = self.dims(op.args[0])
            return tuple((self.new(op.length),) if i in op.dims else dim for i, dim in enumerate(dims))
        if kind in ("matmul", "linear", "einsum"):
            return self._contract(node, op)
        if kind == "baddbmm":
            product = self._contract(node, Op("matmul", op.args[1:]))
            return None if product is None else self._broadcast(node, [self.dims(op.args[0]), product])
        if kind in ("repeat", "stack"):
            return self._copies(node, op)
        return None

    def _regroup(self, dims: Dims, sizes: Sequence[Any]) -> Dims | None:
        """The same atoms in the same order, cut into dimensions of other sizes."""
        queue = list(flat(dims))
        out: list[Dim] = []
        for wanted in sizes:
            group: list[int] = []
            left = wanted
            while left != 1:
                if not queue:
                    return None
                atom = queue.pop(0)
                size = self._size[atom]
                if (rest := quotient(left, size)) is not None:
                    left = rest
                elif (rest := quotient(size, left)) is not None:
                    first, second = self.new(left), self.new(rest)
                    self._parts[atom] = (first, second)
                    queue.insert(0, second)
                    atom, left = first, 1
                else:
                    return None
                group.append(atom)
            out.append(tuple(group))
        return tuple(out) if not queue else None

    def _broadcast(self, node: fx.Node, operands: Sequence[Dims]) -> Dims | None:
        """Element-wise: axes are aligned from the right; those that meet become one."""
        out: list[Dim] = []
        sizes = [expression(size) for size in reading.shape(node)]
        for position in range(1, len(sizes) + 1):
            found: Dim = ()
            for dims in operands:
                dim = dims[-position] if position <= len(dims) else ()
                if found and dim and not self._unify(found, dim):
                    return None
                found = found or dim
            if not found and sizes[-position] != 1:
                found = (self.new(sizes[-position]),)
            out.append(found)
        return tuple(reversed(out))

    def _contract(self, node: fx.Node, op: Op) -> Dims | None:
        if op.kind == "einsum":
            names: dict[str, Dim] = {}
            for term, operand in zip(op.equation, op.args, strict=False):
                for letter, dim in zip(term, self.dims(operand), strict=True):
                    if dim and names.get(letter) and not self._unify(names[letter], dim):
                        return None
                    names[letter] = names.get(letter) or dim
            return tuple(names.get(letter, ()) for letter in op.equation[-1])
        a, b = self.dims(op.args[0]), self.dims(op.args[1])
        if op.kind == "linear":
            return (*a[:-1], b[0]) if len(b) == 2 and self._unify(a[-1], b[1]) else None
        if not self._unify(a[-1], b[-2]):
            return None
        batch: list[Dim] = []
        for position in range(3, max(len(a), len(b)) + 1):
            x = a[-position] if position <= len(a) else ()
            y = b[-position] if position <= len(b) else ()
            if x and y and not self._unify(x, y):
                return None
            batch.append(x or y)
        return (*reversed(batch), a[-2], b[-1])

    def _copies(self, node: fx.Node, op: Op) -> Dims | None:
        """repeat and stack of one tensor: the copies are an axis of their own."""
        dims = list(self.dims(op.args[0]))
        if op.kind == "stack":
            dims.insert(op.dims[0], (self.new(op.length),))
            return tuple(dims)
        sizes = [expression(size) for size in reading.shape(node)]
        dims = [()] * (len(sizes) - len(dims)) + dims
        for i, size in enumerate(sizes):
            own: Any = 1
            for atom in dims[i]:
                own = own * self._size[atom]
            times = quotient(size, own)
            if times is None:
                return None
            if times != 1:
                dims[i] = (self.new(times), *dims[i])
        return tuple(dims)


def flat(dims: Dims) -> tuple[int, ...]:
    """All atoms of some dimensions, in order."""
    return tuple(atom for dim in dims for atom in dim)


def without(dims: Dims, atoms: Sequence[int]) -> Dims:
    """The dimensions left when some atoms go; a dimension that consisted of them alone goes with them."""
    return tuple(kept for dim in dims for kept in [tuple(a for a in dim if a not in atoms)] if kept or not dim)
