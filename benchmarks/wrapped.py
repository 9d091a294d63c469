"""A plain decoder with hyper-connections written around its sublayers: what one does by hand, for ``benchmarks.step``.

Who mixes the streams is a function (``chain.SiteFunction``): the spelling of Hugging Face's DeepSeek-V4, or a peer's
kernels. Streams begin as copies of the embedding and end as their mean.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.chain import STREAMS, Branch, SiteFunction


class Site(nn.Module):
    """A sublayer, its norm included, within a hyper-connection. The parameters are fp32, as Hugging Face keeps them."""

    def __init__(self, function: SiteFunction, width: int, device: torch.device) -> None:
        super().__init__()
        rows = STREAMS * (STREAMS + 2)
        self.function = function
        self.phi = nn.Parameter(torch.randn(rows, STREAMS * width, device=device) * 0.02)
        self.bias = nn.Parameter(torch.zeros(rows, device=device))
        # Three names, no ParameterList: Dynamo of torch 2.11 cannot unpack one.
        self.alpha_pre, self.alpha_post, self.alpha_res = (nn.Parameter(torch.ones(1, device=device)) for _ in range(3))

    @property
    def alphas(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """Scales of pre, post and res."""
        return self.alpha_pre, self.alpha_post, self.alpha_res

    def forward(self, streams: Tensor, branch: Branch) -> Tensor:
        return self.function(streams, (self.phi, self.bias, *self.alphas), branch)


class Attention(nn.Module):
    """The first sublayer of a Qwen3 layer: [B, T, C] -> [B, T, C]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.attention = layer.input_layernorm, layer.self_attn

    def forward(self, u: Tensor, **rest: Any) -> Tensor:
        out: Tensor = self.attention(hidden_states=self.norm(u), **rest)[0]
        return out


class FeedForward(nn.Module):
    """The second one."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = layer.post_attention_layernorm, layer.mlp

    def forward(self, u: Tensor) -> Tensor:
        out: Tensor = self.mlp(self.norm(u))
        return out


class Layer(nn.Module):
    """A Qwen3 layer on streams [B, T, 4, C]; the first one makes them of [B, T, C]."""

    def __init__(self, layer: nn.Module, function: SiteFunction) -> None:
        super().__init__()
        weight = layer.input_layernorm.weight
        self.attention, self.mlp = Attention(layer), FeedForward(layer)
        self.attention_site, self.mlp_site = (Site(function, len(weight), weight.device) for _ in range(2))

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        x = hidden_states
        if x.dim() == 3:
            x = x.unsqueeze(-2).expand(-1, -1, STREAMS, -1).contiguous()
        x = self.attention_site(x, lambda u: self.attention(u, **rest))
        return self.mlp_site(x, self.mlp)


class Collapse(nn.Module):
    """The mean of the streams, and the model's last norm."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, streams: Tensor) -> Tensor:
        out: Tensor = self.norm(streams.mean(-2))
        return out


def wrap(model: nn.Module, function: SiteFunction) -> nn.Module:
    """``Qwen3Model`` with hyper-connections around its sublayers, in place; returns it."""
    model.layers = nn.ModuleList(Layer(layer, function) for layer in model.layers)
    model.norm = Collapse(model.norm)
    return model


def compile_parts(model: nn.Module, backend: str = "inductor") -> nn.Module:
    """Compile what lies between the sites of a wrapped model, for sites that Dynamo cannot look into. A part that would
    not be compiled raises."""
    for part in (model.norm, *(part for layer in model.layers for part in (layer.attention, layer.mlp))):
        part.compile(backend=backend, fullgraph=True)
    return model
