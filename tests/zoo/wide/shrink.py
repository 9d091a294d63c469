"""Shrink a Hugging Face configuration by the names of its attributes.

A rule is a pattern on the attribute's name and a function of its default value. Only fields that a rule names are
touched; the rest keep their defaults, so that every switch of the architecture stays as published. Nested
configurations are shrunk by the same rules. What comes out is a dictionary of keyword arguments, so that the
configuration's own checks and derived values run.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from tests.zoo.base import HEADS, HIDDEN, LAYERS

WORDS = 200
"""Vocabulary: ids below 100 are plain tokens, ids from 100 are the special tokens that multimodal models need."""

Rule = Callable[[Any], Any]


def _at_most(limit: int) -> Rule:
    return lambda value: min(value, limit) if isinstance(value, int) and not isinstance(value, bool) else value


def _fixed(value: Any) -> Rule:
    return lambda default: (
        value if isinstance(default, int) and not isinstance(default, bool) and default > 0 else default
    )


def _widths(value: Any) -> Any:
    """A list of stage widths: keep the ratios, begin at 16; equal widths become HIDDEN."""
    if not isinstance(value, (list, tuple)) or not value or not all(isinstance(v, int) for v in value):
        return value
    if len(set(value)) == 1:
        return type(value)([HIDDEN] * len(value))
    return type(value)(max(16, round(16 * v / value[0] / 8) * 8) for v in value)


def _depths(value: Any) -> Any:
    """A list of stage depths: at most two blocks each."""
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return type(value)(min(v, 2) for v in value)
    return value


def _heads(value: Any) -> Any:
    """Heads for each stage: powers of two that divide the widths of ``_widths``."""
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return type(value)([2] * len(value))
    return _fixed(HEADS)(value)


def _kinds(value: Any) -> Any:
    """A list with one kind for each layer: one layer of each kind, at least LAYERS of them."""
    if not isinstance(value, (list, tuple)) or not value or not isinstance(value[0], str):
        return value
    kinds = list(dict.fromkeys(value))
    return (kinds * LAYERS)[: max(LAYERS, len(kinds))]


def _image(value: Any) -> Any:
    """32 pixels a side, in whatever form sizes are given."""
    if isinstance(value, dict):
        return {key: 32 if isinstance(v, int) else v for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([32] * len(value))
    return _fixed(32)(value)


def _patch(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_patch(v) for v in value)
    return min(value, 8) if isinstance(value, int) else value


RULES: list[tuple[str, Rule]] = [
    (r"(.*_)?vocab_size(_.*)?|vocab_size_input", lambda v: WORDS if isinstance(v, int) and v > WORDS else v),
    (r"(layer_types|layers_block_type|block_types|attention_types|mlp_layer_types|mlp_types|layer_kinds)", _kinds),
    (r"(qk_rope_head_dim|rotary_dim|qk_pos_emb_head_dim)", _at_most(8)),
    (
        r"(qk_nope_head_dim|v_head_dim|qk_head_dim|(.*_)?head_dim|attention_head_size|d_kv|kv_channels|head_size)",
        _at_most(16),
    ),
    (r"(.*_)?lora_rank|index_head_dim|.*_lora_(dim|rank)", _at_most(32)),
    (r"(moe|expert|shared_expert|shared|dense)_(intermediate|ffn_hidden)_size|moe_.*intermediate_size", _at_most(32)),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts|num_selected_experts|experts_per_token|moe_top_k", _at_most(2)),
    (r"(num_.*experts|n_routed_experts|num_experts|moe_num_experts|num_local_experts)", _at_most(4)),
    (r"n_group|topk_group|num_expert_group|n_groups_routing", _at_most(1)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_nextn_predict_layers", _at_most(1)),
    (r"(num_mtp_layers|mtp_num_layers|num_mtp_modules)", lambda v: 0 if isinstance(v, int) else v),
    (r"(num_key_value_heads|num_kv_heads|.*_key_value_heads|multi_query_group_num|num_key_value_groups)", _at_most(2)),
    (
        r"(.*_)?(num_attention_heads|num_heads|n_heads?|attention_heads|nhead|num_attention_head|attn_heads|.*_num_heads)",
        _heads,
    ),
    (
        r"(.*_)?(num_hidden_layers|num_layers|n_layers?|num_blocks|.*layers|num_.*_layers|layers|depth|n_blocks)",
        _at_most(LAYERS),
    ),
    (
        r"(.*_)?(intermediate_size|ffn_dim|d_ff|dim_feedforward|ffn_hidden_size|mlp_dim|ff_dim|n_inner|ffn_size)",
        _at_most(2 * HIDDEN),
    ),
    (
        r"(.*_)?(hidden_sizes|embed_dims|dims|neck_hidden_sizes|stage_channels|encoder_hidden_sizes|out_channels)",
        _widths,
    ),
    (r"(depths|(.*_)?depths|num_blocks|layers|num_encoder_blocks_per_stage)", _depths),
    (
        r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|hidden_dim|embedding_size|emb_dim|dim|width|d_embed|inner_dim|"
        r"encoder_hidden_dim|hidden_size_per_layer_input|projection_dim|output_dim|proj_dim|out_hidden_size|n_embed|"
        r"encoder_width|embedding_dim|model_dim|text_embed_dim|projection_size|decoder_hidden_size)",
        _at_most(HIDDEN),
    ),
    (
        r"(n_positions|max_position_embeddings|max_sequence_length|n_ctx|seq_length|max_seq_len|max_seq_length)",
        _at_most(64),
    ),
    (r"window_size", _at_most(4)),
    (r"(sliding_window|attention_window_size|local_attention|window_attn_size)", _at_most(8)),
    (r"(image_size|input_size|img_size|image_resolution|.*_image_size|pretrain_image_size)", _image),
    (r"(patch_size|.*_patch_size|tubelet_size)", _patch),
    (r"num_frames|frames_per_clip", _at_most(4)),
    (r"(state_size|mamba_d_state|ssm_state_size|d_state|mamba_state_dim)", _at_most(16)),
    (r"(chunk_size|mamba_chunk_size|attention_chunk_size|chunk_length)", _at_most(8)),
    (r"num_mel_bins|n_mels|feature_size|num_mels", _at_most(80)),
    (r"(max_source_positions|max_target_positions)", _at_most(64)),
    (r"conv_dim", lambda v: type(v)([32] * len(v)) if isinstance(v, (list, tuple)) else v),
    (r"num_conv_pos_embeddings", _at_most(16)),
    (r"num_conv_pos_embedding_groups", _at_most(4)),
    (
        r"(num_queries|num_query_tokens|num_latents|query_length|num_learnable_queries|resampler_n_latents)",
        _at_most(10),
    ),
    (
        r".*dropout.*|.*drop_path.*|.*layerdrop.*|.*drop_rate.*",
        lambda v: type(v)(0) if isinstance(v, (int, float)) and not isinstance(v, bool) else v,
    ),
]
COMPILED = [(re.compile(pattern), rule) for pattern, rule in RULES]

KEEP = {"model_type", "num_labels", "dtype", "transformers_version"}
SPECIAL = re.compile(r".*(_token_id|_token_index|_token_ids|_id)$")


COUNTS = re.compile(
    r".*(vocab_size|layers|layer|depth|depths|experts|blocks|types|dropout|drop_path_rate|layerdrop|num_frames|_rate|max_position_embeddings)"
)
"""What level 2 still makes smaller."""


def small(name: str, value: Any, level: int = 0) -> Any:
    """The value for a field of this name.

    By the first rule whose pattern is the whole name and that the level allows.
    """
    for pattern, rule in COMPILED:
        if pattern.fullmatch(name):
            if (level >= 1 and rule in (_widths, _image, _patch)) or (level >= 2 and not COUNTS.fullmatch(name)):
                return value
            if level >= 1 and rule is _heads and isinstance(value, (list, tuple)):
                return value
            return rule(value)
    return value


def _special(name: str, value: Any, taken: dict[str, int]) -> Any:
    """Token ids beyond the small vocabulary: the usual ones 0, 1, 2, each other name an id of its own from 100."""
    if not isinstance(value, int) or isinstance(value, bool) or value < WORDS:
        return value
    usual = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return usual[name] if name in usual else taken.setdefault(name, 100 + len(taken))


def _sections(rope: Any, head_dim: Any) -> Any:
    """Rotary parameters whose multimodal sections sum to half of the (rotated part of the) small head dimension."""
    if not isinstance(rope, dict):
        return rope
    if "mrope_section" in rope:
        half = int((head_dim or HIDDEN // HEADS) * (rope.get("partial_rotary_factor") or 1.0)) // 2
        count = len(rope["mrope_section"])
        return {**rope, "mrope_section": [half - (count - 1) * (half // count)] + [half // count] * (count - 1)}
    return {key: _sections(value, head_dim) for key, value in rope.items()}


def arguments(config: PreTrainedConfig, taken: dict[str, int] | None = None, level: int = 0) -> dict[str, Any]:
    """Keyword arguments for a tiny configuration of the same class as ``config`` (a default instance).

    ``taken`` collects special token ids, so that nested configurations agree on them. ``level`` says how much is left
    as published: 0 nothing, 1 lists of stage widths and sizes of images, 2 every width (only layers, experts, words are
    fewer).
    """
    taken = {} if taken is None else taken
    only_counts = level >= 2
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]  # every configuration is a dataclass since 5.0
        name = field.name
        # Not getattr: an attribute that may vary over the layers refuses to be read for the model as a whole.
        if name in KEEP or name not in config.__dict__:
            continue
        value = config.__dict__[name]
        if isinstance(value, PreTrainedConfig):
            changed[name] = {**arguments(value, taken, level), "model_type": value.model_type}
            continue
        new = _special(name, value, taken) if SPECIAL.fullmatch(name) else small(name, value, level)
        if (
            isinstance(new, (list, tuple))
            and SPECIAL.fullmatch(name)
            and any(isinstance(v, int) and v >= WORDS for v in new)
        ):
            new = type(new)([2])
        if new is not value and new != value:
            changed[name] = new
    if isinstance(rope := config.__dict__.get("rope_parameters"), dict) and not only_counts:
        if "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()) and "rope_type" in rope:
            rope = {"mrope_section": [0, 0, 0], **rope}
        changed["rope_parameters"] = _sections(rope, changed.get("head_dim", config.__dict__.get("head_dim")))
    if "kv_lora_rank" in config.__dict__ and "num_key_value_heads" in changed:
        # Latent attention has as many key and value heads as query heads.
        changed["num_key_value_heads"] = changed.get("num_attention_heads", config.__dict__.get("num_attention_heads"))
    # Lists with one entry for each layer follow the number of layers, unless they decide it.
    kinds = next(
        (changed[key] for key in ("layer_types", "layers_block_type") if isinstance(changed.get(key), list)), None
    )
    if kinds is not None and "num_hidden_layers" in changed:
        changed["num_hidden_layers"] = len(kinds)
    return changed
