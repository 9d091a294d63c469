"""What no rule gives: settings, inputs or a class for one model type, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.zoo import base


@dataclass(frozen=True)
class Special:
    """reason: why the rules do not do. settings: configuration arguments over the shrunken ones (nested allowed).

    inputs: (seed, config) -> keyword arguments of forward. model_class: instead of the registry's first choice.
    sites: the hand-checked number, where the source's names do not show the residual adds.
    """

    reason: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Callable[[int, Any], Mapping[str, Any]] | None = None
    model_class: str = ""
    sites: int | None = None


HEAD = "the rotary embedding needs head_dim, which the default leaves open"
HYBRID = "two layers, one mixer of each kind"


def _ids(seed: int) -> dict[str, Any]:
    return {"input_ids": base.tokens(seed, vocab=90)}


def _images(seed: int, size: int = 32) -> torch.Tensor:
    return base.noise(seed, 2, 3, size, size)


def _boxes(seed: int, config: Any) -> dict[str, Any]:
    """input_ids and bbox float32 [B, S, 8]."""
    return {**_ids(seed), "bbox": torch.rand(2, 12, 8, generator=base.seeded(seed, "bbox"))}


def _decision(seed: int, config: Any) -> dict[str, Any]:
    """States, actions, rewards and returns of a trajectory of 6 steps."""
    return {
        "states": base.noise(seed, 2, 6, config.state_dim),
        "actions": base.noise(seed, 2, 6, config.act_dim, name="actions"),
        "rewards": base.noise(seed, 2, 6, 1, name="rewards"),
        "returns_to_go": base.noise(seed, 2, 6, 1, name="returns"),
        "timesteps": torch.arange(6).repeat(2, 1),
        "attention_mask": torch.ones(2, 6),
    }


def _query_embeds(seed: int, config: Any) -> dict[str, Any]:
    width = config.encoder_hidden_size
    return {
        "query_embeds": base.noise(seed, 2, 10, config.hidden_size),
        "encoder_hidden_states": base.noise(seed, 2, 9, width, name="encoder"),
    }


def _lxmert(seed: int, config: Any) -> dict[str, Any]:
    return {
        **_ids(seed),
        "visual_feats": base.noise(seed, 2, 5, config.visual_feat_dim),
        "visual_pos": torch.rand(2, 5, config.visual_pos_dim, generator=base.seeded(seed, "pos")),
    }


def _patches(seed: int, config: Any) -> dict[str, Any]:
    """flattened_patches [B, 12, 2 + channels x side x side] and some words."""
    side = 16
    flat = base.noise(seed, 2, 12, 2 + 3 * side * side)
    flat[..., :2] = torch.arange(1, 13).view(1, 12, 1)
    return {"flattened_patches": flat, "decoder_input_ids": base.tokens(seed, length=6, vocab=90)}


def _qformer(seed: int, config: Any) -> dict[str, Any]:
    image = config.image_token_index if config.image_token_index is not None else 100
    ids = torch.cat([torch.full((2, config.num_query_tokens), image), base.tokens(seed, vocab=90)], dim=1)
    return {"pixel_values": _images(seed), "input_ids": ids, "qformer_input_ids": base.tokens(seed, vocab=90)}


def _sound(seed: int, config: Any) -> dict[str, Any]:
    """input_values float32 [B, 1, 4000]."""
    return {"input_values": base.noise(seed, 2, 1, 4000)}


def _codebooks(seed: int, config: Any) -> dict[str, Any]:
    """input_ids int64 [B, 12, codebooks + 1]."""
    return {"input_ids": torch.stack([base.tokens(seed, vocab=90)] * (config.num_codebooks + 1), dim=-1)}


def _prompted(seed: int, config: Any) -> dict[str, Any]:
    """Image, prompt and mask of the prompt, each [B, 3, H / 2, W]: the model stacks two of them."""
    height, width = config.image_size
    names = ("pixel_values", "prompt_pixel_values", "prompt_masks")
    return {name: base.noise(seed, 2, 3, height // 2, width, name=name) for name in names}


def _past(length: int, channels: int) -> Callable[[int, Any], dict[str, Any]]:
    """past_values float32 [B, length, channels]."""
    return lambda seed, config: {"past_values": base.noise(seed, 2, length, channels)}


def _forecast(seed: int, config: Any) -> dict[str, Any]:
    """Past and future of a univariate series with one time feature."""
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    features = config.num_time_features
    return {
        "past_values": base.noise(seed, 2, past),
        "past_time_features": base.noise(seed, 2, past, features, name="past time"),
        "past_observed_mask": torch.ones(2, past),
        "future_values": base.noise(seed, 2, future, name="future"),
        "future_time_features": base.noise(seed, 2, future, features, name="future time"),
    }


def _siglip2(seed: int, vision: Any) -> dict[str, Any]:
    """Packed patches [B, 16, channels x side x side], their mask and the shape of the grid."""
    return {
        "pixel_values": base.noise(seed, 2, 16, vision.num_channels * vision.patch_size**2),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def _ids_embeds(seed: int, config: Any) -> dict[str, Any]:
    """Already embedded inputs [B, S, d_model]."""
    return {"inputs": base.noise(seed, 2, 12, config.d_model)}


RESNET = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "backbone_config": {
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage4"],
    },
}

_FORECAST = {
    "prediction_length": 4,
    "context_length": 8,
    "lags_sequence": [1, 2],
    "num_time_features": 1,
    "label_length": 4,
}

EXCEPTIONS: dict[str, Special] = {
    "autoformer": Special("lengths have no default", _FORECAST, _forecast),
    "informer": Special("lengths have no default", _FORECAST, _forecast),
    "time_series_transformer": Special("lengths have no default", _FORECAST, _forecast),
    "patchtst": Special("a window of values", {}, _past(32, 1)),
    "patchtsmixer": Special("a window of values", {}, _past(32, 1)),
    "decision_transformer": Special("a trajectory", {}, _decision),
    "bros": Special("boxes of eight numbers", {}, _boxes),
    "blip_2_qformer": Special("queries and image features as inputs", {"encoder_hidden_size": 64}, _query_embeds),
    "lxmert": Special("visual features as inputs", {}, _lxmert),
    "pix2struct": Special("flattened patches", {"vision_config": {"patch_embed_hidden_size": 768}}, _patches),
    "instructblip": Special(
        "image, words and words for the Q-Former", {"image_token_index": 100, "num_query_tokens": 8}, _qformer
    ),
    "blip-2": Special(
        "image, and words among them places for it",
        {"image_token_index": 100, "num_query_tokens": 8},
        lambda seed, config: {
            "pixel_values": _images(seed),
            "input_ids": torch.cat([torch.full((2, 8), 100), base.tokens(seed, vocab=90)], dim=1),
        },
    ),
    "mimi": Special("the groups are the channels", {"upsample_groups": 64}, _sound),
    "mimi_decoder": Special("the groups are the channels", {"upsample_groups": 64}),
    "csm": Special("the groups are the channels", {"codec_config": {"upsample_groups": 64}}),
    "pocket_tts_audio_tokenizer": Special("the groups are the channels", {"upsample_groups": 64}),
    "pocket_tts_audio_tokenizer_decoder": Special("the groups are the channels", {"upsample_groups": 64}),
    "kyutai_speech_to_text": Special("one id for the text and each codebook", {}, _codebooks),
    "dbrx": Special(
        "the attention's settings have no defaults that run", {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}}
    ),
    "xmod": Special("each language has an adapter", {"default_language": "en_XX"}),
    "videomae": Special(
        "frames first",
        {"num_frames": 4},
        lambda seed, config: {"pixel_values": base.noise(seed, 2, 4, 3, config.image_size, config.image_size)},
    ),
    "seggpt": Special("a prompt with its mask", {"image_size": [64, 32]}, _prompted),
    "superglue": Special(
        "a pair of images", {}, lambda seed, config: {"pixel_values": base.noise(seed, 2, 2, 3, 64, 64)}
    ),
    "detr": Special("a backbone that is there", RESNET),
    "conditional_detr": Special("a backbone that is there", RESNET),
    "deformable_detr": Special("a backbone that is there", {**RESNET, "num_feature_levels": 1}),
    "dab-detr": Special("a backbone that is there", RESNET),
    "bamba": Special(HYBRID, {"attn_layer_indices": [1]}),
    "jamba": Special(
        HYBRID, {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2}
    ),
    "granitemoehybrid": Special(
        HYBRID, {"layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_expand": 2, "mamba_d_head": 16}
    ),
    "mamba2": Special("heads x head_dim = 2 x hidden", {"num_heads": 8, "head_dim": 16, "n_groups": 2}),
    "nemotron_h": Special(
        HYBRID, {"n_groups": 2, "mamba_num_heads": 8, "mamba_head_dim": 16, "num_experts_per_tok": 2, "n_group": 1}
    ),
    "hunyuan_v1_dense": Special(HEAD, {"head_dim": 16}),
    "hunyuan_v1_moe": Special(HEAD, {"head_dim": 16}),
    "hunyuan_vl_text": Special(HEAD, {"head_dim": 16}),
    "hunyuan_vl": Special(HEAD, {"text_config": {"head_dim": 16}}),
    "ministral": Special(HEAD, {"head_dim": 16}),
    "nemotron": Special("key and value heads have no default", {"num_key_value_heads": 4}),
    "deepseek_v2": Special("experts have no default", {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "esm": Special(
        "vocabulary has no default",
        {"vocab_size": 99, "mask_token_id": 3, "pad_token_id": 0, "position_embedding_type": "rotary"},
    ),
    "gemma3n_text": Special(
        "no shared caches with two layers",
        {
            "num_kv_shared_layers": 0,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "step3p7": Special("sliding window has no default", {"text_config": {"sliding_window": 8}}),
    "cohere_compass_text": Special(
        "one local and one global layer", {"layer_types": ["sliding_attention", "full_attention"]}
    ),
    "speecht5": Special("widths named otherwise", {"positional_dropout": 0.0}),
    "gpt_neo": Special(HYBRID, {"attention_types": [[["global", "local"], 1]], "num_layers": 2}),
    "dots1": Special(
        "experts have no default",
        {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    ),
    "lfm2_moe": Special(HYBRID, {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "reformer": Special(
        "axial positions must multiply to the length and sum to the width",
        {
            "axial_pos_shape": [4, 3],
            "axial_pos_embds_dim": [32, 32],
            "attn_layers": ["local", "lsh"],
            "num_buckets": 2,
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
            "is_decoder": False,
            "hash_seed": 0,
        },
    ),
    "levit": Special(
        "published sizes: three stages halve the image",
        {"image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [2, 2, 2], "key_dim": [8, 8, 8]},
    ),
    "mobilevitv2": Special("five stages halve the image", {"image_size": 64}),
    "mobilevit": Special("five stages halve the image", {"image_size": 64}),
    "siglip2": Special(
        "patches with their shapes", {}, lambda seed, config: {**_ids(seed), **_siglip2(seed, config.vision_config)}
    ),
    "siglip2_vision_model": Special("patches with their shapes", {}, lambda seed, config: _siglip2(seed, config)),
    "idefics": Special(
        "one image a row",
        {},
        lambda seed, config: {
            **_ids(seed),
            "pixel_values": _images(seed, config.vision_config.image_size)[:, None],
            "image_attention_mask": torch.ones(2, 12, 1),
        },
    ),
    "lightglue": Special(
        "a pair of images", {}, lambda seed, config: {"pixel_values": base.noise(seed, 2, 2, 3, 64, 64)}
    ),
    "embedding_gemma2_text": Special("two layers", {"num_hidden_layers": 2}),
    "efficientnet": Special(
        "a convolutional network: five blocks instead of 25",
        {"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 32, "hidden_dim": 320},
    ),
    "align": Special(
        "EfficientNet inside",
        {"vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.25, "image_size": 32, "hidden_dim": 320}},
        lambda seed, config: {**_ids(seed), "pixel_values": _images(seed)},
    ),
    "mistral4": Special(
        "latent attention: rope part of the head",
        {"qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4},
    ),
    "longcat_flash": Special(
        "latent attention: rope part of the head",
        {"head_dim": 8, "num_layers": 2, "zero_expert_num": 2, "qk_head_dim": 24},
    ),
    "moonshine": Special(
        "equal key and query heads", {"decoder_num_key_value_heads": 4, "encoder_num_key_value_heads": 4}
    ),
    "perceiver": Special(
        "self-attends of one block",
        {"num_self_attends_per_block": 2, "d_latents": 64, "d_model": 64, "num_latents": 10},
        _ids_embeds,
    ),
}
