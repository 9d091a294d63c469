"""The smallest models that have residual sites, for tests about everything but the finding of sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 16
EAGER: dict[str, Any] = {"compiler": "eager"}


class Block(nn.Module):
    """Pre-norm, two sites: [B, T, C] -> [B, T, C]."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x)).cumsum(-2) * 0.1
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


class Tiny(nn.Module):
    """Token ids [B, T] -> logits [B, T, V]."""

    def __init__(self, layers: int = 2, width: int = WIDTH, vocab: int = 19) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Flat(nn.Module):
    """Every add in the root's own forward: [B, T, C] -> [B, T, C]."""

    def __init__(self, sites: int = 3, width: int = WIDTH) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(sites))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = x + torch.tanh(layer(x))
        return self.norm(x)


def tiny(seed: int = 0, **settings: Any) -> Tiny:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return Tiny(**settings)


def ids(batch: int = 2, length: int = 5, seed: int = 1) -> Tensor:
    """Token ids [batch, length]."""
    return torch.randint(0, 19, (batch, length), generator=torch.Generator().manual_seed(seed))


def compiled(model: Any, **options: Any) -> Any:
    """The model behind the backend, on the eager compiler unless told otherwise."""
    return torch.compile(model, backend="mhc", options={**EAGER, **options})


def loss_of(output: Tensor) -> Tensor:
    """A scalar with a gradient everywhere."""
    wave = torch.sin(torch.arange(output.numel(), dtype=torch.float32) * 1.7 + 0.3)
    return (output.float().reshape(-1) * wave).mean()


def train(call: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer, steps: int = 1) -> list[float]:
    """Losses of some steps of next-token training on fixed data."""
    losses = []
    data = ids(4, 6)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = call(data[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), data[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
