"""Tiny models with one peculiarity each, and what a test needs to convert one graph in many ways.

Everything is 8 channels wide. A block takes the spelling of its residual add as a function, so that one class serves
all spellings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from mhc_compile.config import resolve
from mhc_compile.convert import Conversion, as_error, convert
from mhc_compile.errors import MhcError
from mhc_compile.model import HyperConnection
from mhc_compile.report import CompileReport

WIDTH = 8
TOKENS = 5
Add = Callable[[Tensor, Tensor], Tensor]


def plus(x: Tensor, f: Tensor) -> Tensor:
    return x + f


# ------------------------------------------------------------------------------------------------ parts
class Mlp(nn.Module):
    """Pre-norm feed-forward without the residual. [..., C] -> [..., C]."""

    def __init__(self, width: int = WIDTH, norm: type[nn.Module] | None = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(width) if norm is not None else nn.Identity()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(functional.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Pre-norm self-attention (cross-attention with a memory) without the residual. [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int = WIDTH, norm: type[nn.Module] | None = nn.LayerNorm) -> None:
        super().__init__()
        self.norm = norm(width) if norm is not None else nn.Identity()
        self.q, self.kv, self.o = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        n = self.norm(x)
        k, v = self.kv(n if memory is None else memory).chunk(2, dim=-1)
        return self.o(functional.scaled_dot_product_attention(self.q(n), k, v))


class Block(nn.Module):
    """Attention and feed-forward, two sites, with any spelling of the add."""

    def __init__(self, add: Add = plus, norm: type[nn.Module] | None = nn.LayerNorm) -> None:
        super().__init__()
        self.attn, self.mlp, self.add = Attention(norm=norm), Mlp(norm=norm), add

    def forward(self, x: Tensor) -> Tensor:
        x = self.add(x, self.attn(x))
        return self.add(x, self.mlp(x))


class Stack(nn.Module):
    """Input projection, layers, final norm, head: ``body(layer, x)`` says how a layer is applied to the stream."""

    def __init__(
        self, layers: Iterable[nn.Module], body: Callable[[nn.Module, Tensor], Tensor] | None = None, **extra: nn.Module
    ) -> None:
        super().__init__()
        self.embed, self.layers = nn.Linear(3, WIDTH), nn.ModuleList(layers)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.body = body if body is not None else (lambda layer, x: layer(x))
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = self.body(layer, x)
        return self.head(self.norm(x))


class Lambda(nn.Module):
    """Modules by name and a forward ``function(self, *inputs)``."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in parts.items():
            self.add_module(name, module)

    def forward(self, *inputs: Any) -> Any:
        return self.function(self, *inputs)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 7) -> Tensor:
    """Random inputs; [2, TOKENS, 3] (what ``Stack`` takes) unless told."""
    return torch.randn(*(shape or (2, TOKENS, 3)), generator=torch.Generator().manual_seed(seed)).to(dtype)


# ------------------------------------------------------------------------------------------------ conversion
Outcome = Conversion | MhcError


def conversions(
    model: Callable[..., Any], inputs: Sequence[Any], settings: Sequence[dict[str, Any]], dynamic: bool | None = False
) -> tuple[torch.fx.GraphModule, list[Any], list[Outcome]]:
    """Capture a model once and convert its (last) graph under each of ``settings``: (graph, its inputs, outcomes)."""
    captured: list[Any] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        outcomes: list[Outcome] = []
        for setting in settings:
            try:
                outcomes.append(convert(gm, example_inputs, resolve(dict(setting), None)))
            except Exception as error:
                outcomes.append(as_error(error))
        captured[:] = [gm, list(example_inputs), outcomes]
        return gm.forward

    torch._dynamo.reset()
    torch.compile(model, backend=keep, dynamic=dynamic)(*inputs)
    gm, example_inputs, outcomes = captured
    for outcome in outcomes:
        if isinstance(outcome, MhcError) and outcome.__cause__ is not None and "internal error" in str(outcome):
            raise outcome.__cause__
    return gm, example_inputs, outcomes


def report(model: Callable[..., Any], *inputs: Any, **options: Any) -> CompileReport:
    """The report of one conversion; a refusal raises."""
    _, _, (outcome,) = conversions(model, inputs, [options])
    if isinstance(outcome, MhcError):
        raise outcome
    return outcome.report


def hyper(conversion: Conversion) -> dict[str, HyperConnection]:
    """The hyper-connections of a conversion by qualified name."""
    return dict(conversion.parameters.used.values())


def randomise(conversion: Conversion, seed: int = 1) -> None:
    """Random fp64 parameters far from the start, so that no symmetry hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for module in hyper(conversion).values():
        for name, parameter in module.named_parameters(recurse=False):
            spread = 0.7 if name.startswith("alpha") else 0.5
            value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * spread
            parameter.data = value + (0.5 if name.startswith("alpha") else 0.0)


def exact_start(conversion: Conversion) -> None:
    """The function-preserving start in fp64: the fp32 biases leave the sum of H_pre off 1 by some 1e-8."""
    for module in hyper(conversion).values():
        for parameter in module.parameters():
            parameter.data = parameter.data.double()
        pre = slice(0, module.spec.streams)
        if module.spec.gate == "sigmoid":
            weights = torch.sigmoid(module.bias.data[pre])
            weights = weights / weights.sum()
            module.bias.data[pre] = weights.log() - (1 - weights).log()
        else:
            module.bias.data[pre] /= module.bias.data[pre].sum()


def run(graph: Callable[..., Any], inputs: Sequence[Any], wanted: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    """Outputs of a graph, and the gradient of a fixed projection of them with respect to ``wanted``."""
    outputs = graph(*inputs)
    flat = [o for o in (outputs if isinstance(outputs, (tuple, list)) else [outputs]) if isinstance(o, Tensor)]
    loss: Any = 0.0
    for o in flat:
        if o.requires_grad:
            wave = torch.sin(torch.arange(o.numel(), dtype=torch.float64) * 1.7 + 0.3).to(o.dtype).reshape(o.shape)
            loss = loss + (o * wave).sum()
    gradients = list(torch.autograd.grad(loss, list(wanted), allow_unused=True)) if wanted else []
    return [o.detach() for o in flat], gradients


def parameters_of(inputs: Sequence[Any]) -> list[Tensor]:
    """The inputs that want a gradient."""
    return [v for v in inputs if isinstance(v, Tensor) and v.requires_grad]


def assert_same(actual: Sequence[Any], expected: Sequence[Any], rtol: float, atol: float, what: str = "") -> None:
    """Lists of tensors (None allowed where both have it) agree."""
    assert len(actual) == len(expected), what
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        if a is None or e is None:
            other = a if e is None else e
            assert other is None or not other.any(), f"{what} [{i}]: one of them has no gradient"
            continue
        torch.testing.assert_close(a, e, rtol=rtol, atol=atol, msg=lambda m, i=i: f"{what} [{i}]: {m}")
