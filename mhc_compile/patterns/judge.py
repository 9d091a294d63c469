"""The numerical judge: does the new op compute what the region computed, and its gradient?

Both are run in float64 on the CPU, on ill-conditioned random inputs, and compared to 1e-8 (values) and 1e-6
(gradients); a structural match that reads an eps, an order or a count wrongly does not survive this. Casts are left
out on both sides (the region's own roundings are not what it means), and token axes are shrunk so that a model of any
size takes milliseconds. Equal regions of equal shapes are judged once.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from mhc_compile.patterns import reading
from mhc_compile.patterns.axes import expression

LARGE = 1 << 16
"""Elements of an input or a result above which the token axes are shrunk."""
TOKENS = (2, 3, 2, 2, 2)
"""Sizes that stand in for the token axes."""
_AS_JUDGED: dict[str, Any] = {"dtype": torch.float64, "device": "cpu", "mix_dtype": None}
_OUT_OF_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
}
_SIZED = frozenset(
    ["view", "reshape", "expand", "unflatten", "broadcast_to", "new_zeros", "new_ones", "new_full", "repeat"]
)


class Judge:
    """Judges replacements of one graph; remembers its verdicts."""

    def __init__(self) -> None:
        self._verdicts: dict[object, str | None] = {}
        self.runs = 0

    def disagreement(
        self,
        old: Sequence[fx.Node],
        new: Sequence[fx.Node],
        inputs: Sequence[fx.Node],
        old_nodes: Sequence[fx.Node],
        new_nodes: Sequence[fx.Node],
    ) -> str | None:
        """None if the ``new`` nodes equal the ``old`` ones as functions of ``inputs``; otherwise what differs."""
        key = _signature(old, new, inputs, old_nodes, new_nodes)
        if key not in self._verdicts:
            self._verdicts[key] = self._judge(old, new, inputs, old_nodes, new_nodes)
        return self._verdicts[key]

    def _judge(self, old: Any, new: Any, inputs: Any, old_nodes: Any, new_nodes: Any) -> str | None:
        self.runs += 1
        small = _Sizes([*inputs, *old])  # what is expanded has one axis less than the streams
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            for seed in (0, 1):
                values = _random_inputs(inputs, small, seed)
                try:
                    expected = _replay(old_nodes, values, small)
                    actual = _replay(new_nodes, values, small)
                    reason = _compare(
                        [expected[node] for node in old], [actual[node] for node in new], list(values.values()), seed
                    )
                except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
                    return f"could not be run in float64: {str(error).splitlines()[0]}"
                if reason:
                    return reason
        return None


class _Sizes:
    """Small sizes for the token axes (leading, shared by the activations); every symbol gets one as well."""

    def __init__(self, tensors: Sequence[fx.Node]) -> None:
        shapes = [[expression(s) for s in reading.shape(node)] for node in tensors if reading.is_tensor(node)]
        largest = max(shapes, key=lambda s: (len(s), math.prod(x if isinstance(x, int) else 1 for x in s)), default=[])
        total = math.prod(x if isinstance(x, int) else 64 for x in largest)
        self.symbols: dict[Any, int] = {}
        self.sizes: dict[int, int] = {}
        self.lead = max(len(largest) - 2, 0)
        stand_ins = iter(TOKENS + (2,) * 8)
        for size in (s for row in shapes for s in row):
            for symbol in sorted(getattr(size, "free_symbols", ()), key=str):
                self.symbols.setdefault(symbol, next(stand_ins))
        if total > LARGE:
            for size in largest[: self.lead]:
                if isinstance(size, int) and size > 3:
                    self.sizes.setdefault(size, next(stand_ins))
            product = math.prod(x for x in largest[: self.lead] if isinstance(x, int))
            self.sizes.setdefault(product, math.prod(self.of(x) for x in largest[: self.lead]))

    def of(self, size: Any) -> int:
        """The size to use for a token axis."""
        size = expression(size)
        return self.sizes.get(size, size) if isinstance(size, int) else int(size.subs(self.symbols))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """The shape to use for an input."""
        sizes = reading.shape(node)
        return tuple(self.of(s) if i < self.lead else self.plain(s) for i, s in enumerate(sizes))

    def plain(self, size: Any) -> int:
        """A size that is no token axis: only symbols are replaced."""
        size = expression(size)
        return size if isinstance(size, int) else int(size.subs(self.symbols))


def _random_inputs(inputs: Sequence[fx.Node], small: _Sizes, seed: int) -> dict[fx.Node, Any]:
    """Spread over several orders of magnitude along the token axes, so that every eps is felt."""
    generator = torch.Generator().manual_seed(seed)
    values: dict[fx.Node, Any] = {}
    for node in inputs:
        fake = reading.value(node)
        if not isinstance(fake, Tensor):
            values[node] = small.plain(fake) if isinstance(fake, torch.SymInt) else fake
            continue
        sizes = small.shape(node)
        if not fake.dtype.is_floating_point:
            values[node] = torch.zeros(sizes, dtype=fake.dtype)
            continue
        drawn = torch.randn(sizes, dtype=torch.float64, generator=generator) * 2.0
        if len(sizes) > 2:
            spread = torch.randn((*sizes[:-2], 1, 1), dtype=torch.float64, generator=generator)
            drawn = drawn * torch.exp(spread - 0.5)
        elif sizes and sizes[-1] > 16:
            drawn = drawn / math.sqrt(sizes[-1])
        values[node] = drawn.requires_grad_()
    return values


def _replay(nodes: Sequence[fx.Node], values: dict[fx.Node, Any], small: _Sizes) -> dict[fx.Node, Any]:
    """Run nodes on float64 values; casts pass their argument on."""
    env = dict(values)
    for node in nodes:
        op = reading.read(node)
        if op is not None and op.kind == "cast":
            env[node] = env[op.args[0]]
            continue
        if isinstance(reading.value(node), torch.SymFloat):
            env[node] = float(reading.value(node).node.hint)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
        kwargs = {**kwargs, **{k: v for k, v in _AS_JUDGED.items() if k in kwargs}}
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if name in _SIZED and small.sizes:
            args = _resize(args, small)
        target: Any = node.target
        if op is not None and op.inplace:  # nobody else sees the buffer, or the region would not have come here
            target = _OUT_OF_PLACE.get(target, str(target).removesuffix("_"))
        if isinstance(target, str):
            env[node] = getattr(args[0], target)(*args[1:], **kwargs)
        else:
            env[node] = target(*args, **kwargs)
        if isinstance(env[node], Tensor) and env[node].dtype in (torch.float32, torch.bfloat16, torch.float16):
            env[node] = env[node].double()
    return env


def _resize(args: tuple[Any, ...], small: _Sizes) -> tuple[Any, ...]:
    """Literal sizes of token axes in the arguments of a view become the small ones."""
    first, rest = args[0], args[1:]
    nested = len(rest) == 1 and isinstance(rest[0], list | tuple)
    sizes = list(rest[0] if nested else rest)
    for i, size in enumerate(sizes[: max(small.lead, 1)]):
        if isinstance(size, int) and size in small.sizes:
            sizes[i] = small.sizes[size]
    return (first, sizes) if nested else (first, *sizes)


def _compare(expected: list[Any], actual: list[Any], inputs: list[Any], seed: int) -> str | None:
    generator = torch.Generator().manual_seed(100 + seed)
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape:
            return f"the shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
        if not torch.allclose(a, b, rtol=1e-8, atol=1e-10 * _scale(a), equal_nan=True):
            return f"the values differ by {(a - b).abs().max().item():.1e}"
    leaves = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    weights = [torch.randn(a.shape, dtype=torch.float64, generator=generator) for a in expected]
    grads = [_gradients(outputs, weights, leaves) for outputs in (expected, actual)]
    for a, b in zip(*grads, strict=True):
        if (a is None) != (b is None) or (
            a is not None and not torch.allclose(a, b, rtol=1e-6, atol=1e-8 * _scale(a), equal_nan=True)
        ):
            return "the gradients differ"
    return None


def _scale(tensor: Tensor) -> float:
    finite = tensor.detach()[torch.isfinite(tensor)]
    return float(finite.abs().max()) if finite.numel() else 1.0


def _gradients(outputs: list[Tensor], weights: list[Tensor], leaves: list[Tensor]) -> Sequence[Tensor | None]:
    pairs = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not pairs or not leaves:
        return [None] * len(leaves)
    return torch.autograd.grad([o for o, _ in pairs], leaves, [w for _, w in pairs], allow_unused=True)


def _signature(old: Any, new: Any, inputs: Any, old_nodes: Any, new_nodes: Any) -> object:
    """What two judgements have in common if their outcome must be the same: operations, wiring, literals, shapes."""
    number: dict[fx.Node, int] = {}
    for node in inputs:
        number[node] = len(number)
    rows: list[object] = [
        (str(reading.dtype(n)), str(reading.shape(n))) if reading.is_tensor(n) else repr(reading.value(n))
        for n in inputs
    ]

    for nodes in (old_nodes, new_nodes):
        for node in nodes:
            literals = fx.map_arg((node.args, node.kwargs), lambda n: f"%{number.get(n, -1)}")
            rows.append((node.op, str(node.target), repr(literals)))
            number[node] = len(number)
    rows.append((tuple(number[n] for n in old), tuple(number[n] for n in new)))
    return tuple(rows)
