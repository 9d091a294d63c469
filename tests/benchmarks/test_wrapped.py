"""Hyper-connections written around the sublayers of Qwen3: as Hugging Face's own modules and our converted model."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.chain import spelled_site
from benchmarks.wrapped import compile_parts, wrap
from mhc_compile.backend import mhc
from mhc_compile.model.hyper_connection import hyper_connections
from tests.benchmarks.test_peers import from_references, restated

pytest.importorskip("transformers")
WIDTH, LAYERS = 32, 2


def qwen3(layers: int = LAYERS) -> nn.Module:
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        hidden_size=WIDTH, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_hidden_layers=layers, vocab_size=64, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3Model(config).train()


def outputs(model: Any) -> Tensor:
    ids = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(1))
    out: Tensor = model(input_ids=ids, attention_mask={"full_attention": None}, use_cache=False).last_hidden_state
    return out


def sites_of(model: nn.Module) -> list[Any]:
    return [site for layer in model.layers for site in (layer.attention_site, layer.mlp_site)]


def disturbed(model: nn.Module) -> nn.Module:
    """Biases and scales that no two sites share, so that every parameter and its place matter."""
    with torch.no_grad():
        for number, site in enumerate(sites_of(model)):
            generator = torch.Generator().manual_seed(number)
            site.phi.copy_(torch.randn(site.phi.shape, generator=generator) * 0.1)
            site.bias.copy_(torch.randn(site.bias.shape, generator=generator))
            for alpha, value in zip(site.alphas, (0.5, 0.75, 1.25), strict=True):
                alpha.fill_(value)
    return model


class Reference(nn.Module):
    """A Qwen3 layer in the words of DeepseekV4DecoderLayer, with its own hyper-connections."""

    def __init__(self, layer: nn.Module, sites: list[Any]) -> None:
        from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

        super().__init__()
        config: Any = types.SimpleNamespace(
            hc_mult=4, hc_sinkhorn_iters=20, hc_eps=1e-6, rms_norm_eps=1e-6, hidden_size=WIDTH
        )
        self.layer = layer
        self.attn_hc, self.ffn_hc = (DeepseekV4HyperConnection(config) for _ in range(2))
        with torch.no_grad():
            for own, site in zip((self.attn_hc, self.ffn_hc), sites, strict=True):
                own.fn.copy_(site.phi)
                own.base.copy_(site.bias)
                own.scale.copy_(torch.cat(list(site.alphas)))

    def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
        x = hidden_states if hidden_states.dim() == 4 else hidden_states.unsqueeze(2).repeat(1, 1, 4, 1)
        post, comb, u = self.attn_hc(x)
        y, _ = self.layer.self_attn(hidden_states=self.layer.input_layernorm(u), **rest)
        x = post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
        post, comb, u = self.ffn_hc(x)
        y = self.layer.mlp(self.layer.post_attention_layernorm(u))
        return post.unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)


def test_the_spelling_is_hugging_faces() -> None:
    model, plain = disturbed(wrap(qwen3(), spelled_site)), qwen3()
    plain.layers = nn.ModuleList(
        Reference(layer, sites_of(model)[2 * number : 2 * number + 2]) for number, layer in enumerate(plain.layers)
    )
    norm = plain.norm
    plain.norm = nn.Identity()
    out, wanted = outputs(model), norm(outputs(plain).mean(2))
    torch.testing.assert_close(out, wanted)
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    ours = [model.embed_tokens.weight, *(tensor for site in sites_of(model) for tensor in (site.phi, site.bias))]
    theirs = [one for layer in plain.layers for hc in (layer.attn_hc, layer.ffn_hc) for one in (hc.fn, hc.base)]
    gradients = torch.autograd.grad(out, ours, seed)
    exact = torch.autograd.grad(wanted, [plain.embed_tokens.weight, *theirs], seed)
    torch.testing.assert_close(gradients, exact, rtol=1e-4, atol=1e-4)
    assert all(float(gradient.abs().max()) > 0 for gradient in gradients)


def test_the_converted_model_with_the_same_parameters() -> None:
    """It mixes by H_res where the spelling takes the transpose. Of a matrix that is normalised along both axes that is
    the matrix of the transposed logits."""
    model, plain = disturbed(wrap(qwen3(), spelled_site)), qwen3()
    converted = torch.compile(plain, backend=mhc, options={"compiler": "eager"})
    outputs(converted)
    turned = torch.cat([torch.arange(8), 8 + torch.arange(16).view(4, 4).t().flatten()])
    own = [one for name, one in hyper_connections(plain) if one.spec.parts == ("pre", "post", "res")]
    with torch.no_grad():
        for site, connection in zip(sites_of(model), own, strict=True):
            connection.phi.copy_(site.phi[turned])
            connection.bias.copy_(site.bias[turned])
            for part, alpha in zip(("pre", "post", "res"), site.alphas, strict=True):
                connection.get_parameter(f"alpha_{part}").copy_(alpha)
    torch.testing.assert_close(outputs(converted), outputs(model), rtol=1e-3, atol=1e-3)


def test_dynamo_sees_all_of_it() -> None:
    model = wrap(qwen3(1), spelled_site)
    torch.testing.assert_close(outputs(torch.compile(model, backend="eager", fullgraph=True)), outputs(model))


def test_a_peer_around_compiled_sublayers() -> None:
    """TileKernels' functions, restated in plain torch, in bf16."""
    site = peers.tile_kernels_functions(*from_references(restated()))
    model, other = (disturbed(wrap(qwen3().bfloat16(), one)) for one in (site, spelled_site))
    assert all(one.phi.dtype == torch.float32 for one in sites_of(model))
    out, wanted = outputs(compile_parts(model, "eager")), outputs(other).detach().float()
    assert out.dtype == torch.bfloat16
    assert float((out.detach().float() - wanted).norm() / wanted.norm()) < 0.02
    out.float().square().mean().backward()
    assert all(one.phi.grad is not None and float(one.phi.grad.abs().max()) > 0 for one in sites_of(model))
