"""The four families of Hugging Face that have hyper-connections of their own, as tiny models of float32 weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {"n_routed_experts": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 16, "intermediate_size": 32}


def _finish(model: type[nn.Module], config: Any) -> nn.Module:
    config._attn_implementation = "eager"
    config._experts_implementation = "batched_mm"
    torch.manual_seed(0)
    result = model(config)
    for name, parameter in result.named_parameters():
        if parameter.dim() < 2 and "norm" not in name:
            nn.init.normal_(parameter, std=0.5)  # zeros and ones would hide a bias or a scale that is read wrongly
    return result


def deepseek_v4(layers: int = 2) -> nn.Module:
    """Sinkhorn, H used transposed, sigma-gated head."""
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as module

    config = module.DeepseekV4Config(
        **TINY,
        num_hidden_layers=layers,
        head_dim=16,
        q_lora_rank=16,
        partial_rotary_factor=0.5,
        n_routed_experts=4,
        sliding_window=8,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=4,
        layer_types=["sliding_attention"] * layers,
        mlp_layer_types=["moe"] * layers,
    )
    return _finish(module.DeepseekV4Model, config)


def glm5_next(layers: int = 2) -> nn.Module:
    """As DeepSeek-V4, with a mean at the end."""
    from transformers.models.glm5_next import modeling_glm5_next as module

    config = module.Glm5NextTextConfig(
        **TINY,
        **LATENT,
        num_hidden_layers=layers,
        num_key_value_heads=4,
        qk_nope_head_dim=16,
        mlp_layer_types=["dense"] * layers,
        layer_types=["linear_attention"] * layers,
        linear_head_dim=8,
        linear_num_heads=4,
    )
    return _finish(module.Glm5NextTextModel, config)


def hy_v4(layers: int = 2) -> nn.Module:
    """No H; the norm after the projection; a magnitude and a floor on post."""
    from transformers.models.hy_v4 import modeling_hy_v4 as module

    config = module.HYV4Config(
        **TINY,
        **LATENT,
        num_hidden_layers=layers,
        num_key_value_heads=4,
        head_dim=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        mlp_layer_types=["dense"] * layers,
        index_topk=4,
        index_head_dim=16,
        index_n_heads=2,
    )
    return _finish(module.HYV4Model, config)


def qwen4_exp(layers: int = 2) -> nn.Module:
    """No H; streams side by side in one axis, each with its own norm; the branch reads a gate per channel."""
    from transformers.models.qwen4_exp import modeling_qwen4_exp as module

    config = module.Qwen4ExpTextConfig(
        **TINY,
        num_hidden_layers=layers,
        num_key_value_heads=2,
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        shared_expert_intermediate_size=16,
        num_experts=4,
        layer_types=["linear_attention"] * layers,
        hc_lowrank=8,
        ple_layer_ids=[],
    )
    return _finish(module.Qwen4ExpTextModel, config)


FAMILIES = {"deepseek_v4": deepseek_v4, "glm5_next": glm5_next, "hy_v4": hy_v4, "qwen4_exp": qwen4_exp}


def ids(batch: int = 2, length: int = 6) -> Tensor:
    """Token ids for any of them."""
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(1))
