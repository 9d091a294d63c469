"""What an entry of the zoo is, and the few helpers that make every model of it small, random, deterministic and alive.

An entry builds a tiny model (hidden size 64, two or three layers, float32, CPU, nothing downloaded) together with one
batch of inputs and a scalar loss. The number of residual sites is a *rule* on the built model (layers x sublayers),
never a number read off a run of the code under test.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Status = Literal["converted", "refused"]
Loss = Callable[[Any], Tensor]

HIDDEN = 64
LAYERS = 2
HEADS = 4
VOCAB = 97
BATCH = 2
LENGTH = 12


@dataclass(frozen=True)
class Example:
    """A built entry: ``loss(model(**inputs))`` is a 0-dim float32 tensor with a gradient for the model's parameters."""

    model: nn.Module
    inputs: Mapping[str, Any]
    loss: Loss


@dataclass(frozen=True)
class Entry:
    """One architecture of the zoo.

    name: unique, lower case.
    kind: decoder, encoder, encoder-decoder, vision, audio, multimodal, ssm, diffusion or style.
    build: seed -> Example; the same seed gives the same bits.
    sites: built model -> number of residual sites; rule: the same in words.
    status: what the default options do.
    reason: for "refused", a part of the reason that the report must give (case-insensitive).
    graphs: number of graphs that Dynamo captures for one call in training mode.
    options: backend options under which a second conversion is expected to succeed (post_norm="per_stream" for BERT).
    """

    name: str
    kind: str
    build: Callable[[int], Example]
    sites: Callable[[nn.Module], int]
    rule: str
    status: Status = "converted"
    reason: str = ""
    graphs: int = 1
    options: Mapping[str, object] = field(default_factory=dict)
    notes: str = ""


def seeded(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and on a name, and on nothing else (``hash`` is salted per process)."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))


def tokens(seed: int, batch: int = BATCH, length: int = LENGTH, vocab: int = VOCAB, name: str = "tokens") -> Tensor:
    """int64 [batch, length] in [3, vocab): clear of the usual pad, begin and end ids."""
    return torch.randint(3, vocab, (batch, length), generator=seeded(seed, name))


def noise(seed: int, *shape: int, name: str = "noise") -> Tensor:
    """float32 standard normal of the given shape."""
    return torch.randn(*shape, generator=seeded(seed, name))


def float_outputs(output: object) -> Iterator[Tensor]:
    """The floating-point tensors of a model's output, in the order of the output; caches and flags are passed over."""
    leaves = tree_leaves(dict(output)) if isinstance(output, Mapping) else tree_leaves(output)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel() > 0:
            yield leaf


def projection_loss(output: object) -> Tensor:
    """Sum over the differentiable outputs of their product with a fixed wave, divided by sqrt(numel).

    A mean square would be constant behind a final norm and give no gradient; a projection has a gradient everywhere.
    Values that a mask has set to -inf or to the lowest float are left out (``where``), for their product is not finite.
    """
    total: Tensor | None = None
    for leaf in (leaf for leaf in float_outputs(output) if leaf.requires_grad):
        flat = leaf.float().reshape(-1)
        wave = torch.sin(torch.arange(flat.numel(), dtype=torch.float32, device=flat.device) * 1.7 + 0.3)
        usable = flat.detach().abs() < 1e8
        term = (torch.where(usable, flat, 0.0) * wave).sum() / math.sqrt(flat.numel())
        total = term if total is None else total + term
    if total is None:
        raise ValueError("the model returns no differentiable tensor")
    return total


def silence(model: nn.Module) -> None:
    """Turn off every source of randomness in the forward pass: dropout of any spelling, LayerDrop, stochastic depth."""
    words = (
        "dropout",
        "drop_path",
        "layerdrop",
        "drop_prob",
        "drop_rate",
        "apply_spec_augment",
        "mask_time_prob",
        "jitter_noise",
    )
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for key, value in list(vars(holder).items()) if hasattr(holder, "__dict__") else ():
                if isinstance(value, (bool, float, int)) and any(word in key for word in words):
                    # PretrainedConfig checks types on assignment, so that False stays False and 0.0 stays 0.0.
                    setattr(holder, key, type(value)(0))


def enliven(model: nn.Module, seed: int) -> None:
    """Add noise (std 0.05) to vectors and scalars and fill all-zero matrices (std 0.02).

    Zero gates (adaLN-zero, ReZero, layer scale), zero biases and unit norms would hide a wrong rewrite: the branch
    would add nothing, or a norm applied to the wrong tensor would not show.
    """
    generator = seeded(seed, "enliven")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.dim() <= 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype), alpha=0.05)
            elif not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def finish(model: nn.Module, seed: int) -> nn.Module:
    """Common end of every builder: training mode, no randomness, no dead branch, float32."""
    model = model.float().train()
    silence(model)
    enliven(model, seed)
    return model
