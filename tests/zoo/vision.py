"""Vision and vision-language models of the published list."""

from __future__ import annotations

from typing import Any

from torch import nn

from tests.zoo.base import HEADS, HIDDEN, LAYERS, Entry
from tests.zoo.hf import SMALL_TEXT, builder, image_inputs, image_text_inputs
from tests.zoo.text import TWO, two_a_layer

SMALL_VISION: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
_TOWER_TEXT = {k: v for k, v in SMALL_TEXT.items() if k != "num_key_value_heads"}


def swin_sites(model: nn.Module) -> int:
    """Windowed attention and feed-forward in every block of every stage."""
    config: Any = model.config
    return 2 * sum(config.depths)


def two_tower_sites(model: nn.Module) -> int:
    """Two sites for each layer of the text and of the vision tower."""
    config: Any = model.config
    return 2 * (int(config.text_config.num_hidden_layers) + int(config.vision_config.num_hidden_layers))


def siglip_sites(model: nn.Module) -> int:
    """The tower, and the feed-forward of the attention pooling head."""
    return two_a_layer(model) + 1


_TOWERS = "2 x (text layers + vision layers)"

ENTRIES: list[Entry] = [
    Entry("vit", "vision", builder("vit", "ViTModel", image_inputs, **SMALL_VISION), two_a_layer, TWO),
    Entry(
        "dinov2",
        "vision",
        builder("dinov2", "Dinov2Model", image_inputs, **{**SMALL_VISION, "mlp_ratio": 2}),
        two_a_layer,
        TWO,
        notes="layer scale on each branch",
    ),
    Entry(
        "siglip-vision",
        "vision",
        builder("siglip_vision_model", "SiglipVisionModel", image_inputs, **SMALL_VISION),
        siglip_sites,
        "2 x num_hidden_layers + 1 (feed-forward of the pooling head)",
        notes="the pooled vector is a residual stream of its own, of one site",
    ),
    Entry(
        "clip",
        "multimodal",
        builder(
            "clip",
            "CLIPModel",
            image_text_inputs,
            text_config=_TOWER_TEXT,
            vision_config=SMALL_VISION,
            projection_dim=32,
        ),
        two_tower_sites,
        _TOWERS,
        notes="two chains of different widths in one graph",
    ),
    Entry(
        "swin",
        "vision",
        builder(
            "swin",
            "SwinModel",
            image_inputs,
            image_size=32,
            patch_size=2,
            embed_dim=32,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
            num_channels=3,
        ),
        swin_sites,
        "2 x sum(depths); patch merging ends one chain and begins the next",
        notes="windows, cyclic shift; width 32 then 64",
    ),
]
