"""Inputs for a model's forward from its signature and its configuration."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tests.zoo import base

BATCH, LENGTH = 2, 12


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first attribute of these names on the configuration or on one of its nested configurations."""
    nested = [
        getattr(config, key) for key in getattr(config, "sub_configs", {}) if getattr(config, key, None) is not None
    ]
    for holder in (config, *nested):
        for name in names:
            value = getattr(holder, name, None)
            if value is not None:
                return value
    return default


def _side(value: Any) -> tuple[int, int]:
    if isinstance(value, dict):
        return int(value.get("height", 32)), int(value.get("width", 32))
    if isinstance(value, (list, tuple)):
        return int(value[-2]), int(value[-1])
    return int(value), int(value)


def ids(seed: int, name: str = "ids", length: int = LENGTH) -> torch.Tensor:
    """int64 [B, length] of plain tokens."""
    return base.tokens(seed, BATCH, length, 90, name)


def pixels(seed: int, config: Any) -> torch.Tensor:
    """float32 [B, channels, H, W]."""
    vision = getattr(config, "vision_config", None) or config
    height, width = _side(_first(vision, "image_size", "img_size", "input_size", "image_resolution", default=64))
    return base.noise(
        seed, BATCH, int(_first(vision, "num_channels", "in_channels", "in_chans", default=3)), height, width
    )


EXTRA: list[tuple[str, ...]] = [
    (),
    ("pixel_values",),
    ("input_ids",),
    ("input_ids", "pixel_values"),
    ("decoder_input_ids",),
    ("input_features",),
    ("input_ids", "input_features"),
    ("input_ids", "pixel_values", "bbox"),
    ("input_values",),
    ("input_features", "input_features_mask"),
]
"""Optional arguments to add to the required ones, in the order in which they are tried."""
VARIANTS = 2


def inputs(model: nn.Module, config: Any, seed: int, ladder: int = 0) -> dict[str, Any] | None:
    """Keyword arguments for ``model.forward``: required arguments, main input, and those of this rung of the ladder.

    Rung r adds EXTRA[r % len(EXTRA)] in layout variant r // len(EXTRA). None if the rung asks for nothing that the
    signature has, so that it would repeat an earlier one.
    """
    extra, variant = EXTRA[ladder % len(EXTRA)], ladder // len(EXTRA)
    names = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    if extra and not all(name in names for name in extra):
        return None
    required = {
        n for n, p in names.items() if p.default is inspect.Parameter.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    }
    wanted = required | ({main} if main in names else set()) | set(extra)
    if "decoder_input_ids" in names and (getattr(config, "is_encoder_decoder", False) or "input_features" in names):
        wanted.add("decoder_input_ids")
    if not ({"input_ids", "pixel_values", "input_features", "input_values"} & wanted) and "pixel_values" in names:
        wanted.add("pixel_values")
    given: dict[str, Any] = {}
    if {"grid_thw", "image_grid_thw"} & wanted:
        return packed_patches(config, seed, wanted)
    for name in names:
        if name in wanted and (value := make(name, config, seed, variant)) is not None:
            given[name] = value
    return given


def packed_patches(config: Any, seed: int, wanted: set[str]) -> dict[str, Any]:
    """Flattened patches [16, channels x frames x side x side] of one 4 x 4 image, as the Qwen vision towers take them.

    ""Flattened patches [16, channels x frames x side x side] of one 4 x 4 image, as the Qwen vision towers take them.
    """
    side = _first(config, "patch_size", default=8)
    side = side[0] if isinstance(side, (list, tuple)) else side
    channels = int(_first(config, "in_channels", "in_chans", "num_channels", default=3))
    width = channels * int(getattr(config, "temporal_patch_size", None) or 1) * int(side) ** 2
    name = next(n for n in sorted(wanted) if not n.endswith("grid_thw"))
    grid = next(n for n in wanted if n.endswith("grid_thw"))
    return {name: base.noise(seed, 16, width), grid: torch.tensor([[1, 4, 4]])}


def make(name: str, config: Any, seed: int, variant: int = 0) -> Any:
    """One argument of that name, or None if no rule knows it."""
    channels = int(_first(config, "num_channels", default=3))
    width = _first(config, "hidden_size", "d_model", "embed_dim", default=base.HIDDEN)
    width = int(width[-1] if isinstance(width, (list, tuple)) else width)
    mel = int(
        _first(
            config,
            "num_mel_bins",
            "n_mels",
            "num_mels",
            "feature_size",
            "input_feat_per_channel",
            "num_features",
            default=80,
        )
    )
    if name in ("input_ids", "decoder_input_ids", "input_char_ids", "text_input_ids"):
        return ids(seed, name, LENGTH if name != "decoder_input_ids" else LENGTH // 2)
    if name in ("pixel_values", "pixel_values_images", "image_pixel_values", "images"):
        return pixels(seed, config)
    if name in ("pixel_values_videos", "video", "pixel_values_video"):
        height, side = _side(_first(config, "image_size", "crop_size", default=32))
        frames = int(_first(config, "num_frames", "frames_per_clip", default=4))
        return base.noise(seed, BATCH, frames, channels, height, side)
    if name == "input_features":
        length = 2 * int(_first(config, "max_source_positions", default=32))
        bins_first = hasattr(config, "max_source_positions") != bool(variant)
        return base.noise(seed, BATCH, mel, length) if bins_first else base.noise(seed, BATCH, length, mel)
    if name in ("input_values", "audio_values", "waveform"):
        if variant and hasattr(config, "max_length") and hasattr(config, "num_mel_bins"):
            return base.noise(seed, BATCH, int(config.max_length), mel)
        return base.noise(seed, BATCH, 1, 4000) if variant else base.noise(seed, BATCH, 4000)
    if name in (
        "inputs_embeds",
        "hidden_states",
        "encoder_hidden_states",
        "tgt",
        "hidden_state",
        "embeddings",
        "image_embeddings",
    ):
        return base.noise(seed, BATCH, LENGTH, width, name=name)
    if name in ("attention_mask", "padding_mask", "pixel_mask"):
        return torch.ones(BATCH, LENGTH, dtype=torch.long)
    if name in ("input_features_mask", "feature_attention_mask"):
        return torch.ones(BATCH, 64, dtype=torch.long)
    if name == "bbox":
        return torch.tensor([1, 1, 5, 5]).repeat(BATCH, LENGTH, 1)
    if name in ("past_values", "past_observed_mask", "future_values"):
        length = int(_first(config, "context_length", default=32)) + max(_first(config, "lags_sequence", default=[0]))
        return base.noise(seed, BATCH, length) if name != "past_observed_mask" else torch.ones(BATCH, length)
    if name == "visual_feats":
        return base.noise(seed, BATCH, 5, int(_first(config, "visual_feat_dim", default=2048)))
    if name == "visual_pos":
        return base.noise(seed, BATCH, 5, int(_first(config, "visual_pos_dim", default=4)))
    return None
