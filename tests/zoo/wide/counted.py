"""Numbers of sites counted by hand, where the names in the source mislead ``expect``; each with its reason."""

from __future__ import annotations

NEW_STREAM = "the first block of a stage projects its shortcut: the stream ends there and a new one begins"
COUNTED: dict[str, tuple[int, str]] = {
    "bit": (4, NEW_STREAM),
    "bridgetower": (4, "vision tower: attention and mlp in two layers; the text and cross-modal layers are post-norm"),
    "dac": (24, "three residual units in four blocks of encoder and decoder; the Snake activation is no residual"),
    "focalnet": (16, "modulation and mlp in two layers of four stages"),
    "hiera": (13, NEW_STREAM),
    "minimax_m3_vl": (4, "the sum with the shared expert is inside the mlp"),
    "minimax_m3_vl_text": (4, "the sum with the shared expert is inside the mlp"),
    "pegasus_x": (
        11,
        "2 x 2 encoder, 2 x 3 decoder, and of the global tokens' stream the mlp of the first layer: it begins in a "
        "parameter, and what the last layer does with it is read by nothing",
    ),
    "pp_lcnet_v3": (0, "parallel convolutions are added, none of them is a carrier"),
    "pp_lcnet_v4": (11, "two of the thirteen blocks change the width and have no residual"),
    "pp_ocrv6_small_rec": (11, "two of the thirteen blocks change the width and have no residual"),
    "pp_ocrv6_tiny_rec": (11, "two of the thirteen blocks change the width and have no residual"),
    "recurrent_gemma": (4, "mixer and mlp in two layers; the first add has other names"),
    "regnet": (4, NEW_STREAM),
    "resnet": (4, NEW_STREAM),
    "sam3_lite_text_text_model": (4, "mixer and mlp in two layers; two branches under batch norms have no carrier"),
    "univnet": (17, "3 x 2 in the kernel predictors, 3 x 4 in the blocks, less one: the first carrier is noise alone"),
}
