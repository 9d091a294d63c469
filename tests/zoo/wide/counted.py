"""Numbers of sites counted by hand, where the names in the source mislead ``expect``; each with its reason."""

from __future__ import annotations

NEW_STREAM = "the first block of a stage projects its shortcut: the stream ends there and a new one begins"
INKLING2 = (
    "three of the stream (the first layer's attention begins it), and the short convolutions of keys, values and "
    "output in that first layer, which is no branch of a residual add"
)
BACKBONE = "the first block of the backbone; its other blocks project their shortcut, encoder and decoder are post-norm"
COUNTED: dict[str, tuple[int, str]] = {
    "bit": (4, NEW_STREAM),
    "bridgetower": (4, "vision tower: attention and mlp in two layers; the text and cross-modal layers are post-norm"),
    "conditional_detr": (1, BACKBONE),
    "cpmant": (4, "attention and feed-forward in two layers; the segment embedding is added in front of them"),
    "ctrl": (4, "attention and feed-forward in two layers; two of the sums have names of their own"),
    "dab-detr": (1, BACKBONE),
    "dac": (24, "three residual units in four blocks of encoder and decoder; the Snake activation is no residual"),
    "deformable_detr": (1, BACKBONE),
    "detr": (1, BACKBONE),
    "focalnet": (16, "modulation and mlp in two layers of four stages"),
    "gemma3n_text": (
        5,
        "attention with laurel, and mlp, in two layers; and the first AltUp prediction, which is added to the stack of "
        "the model's own streams (the second reads a stack that was written in place)",
    ),
    "hiera": (13, NEW_STREAM),
    "hrm_text": (32, "attention and mlp in two layers, eight cycles; the states of the two modules join in between"),
    "inkling2": (6, INKLING2),
    "inkling2_text": (6, INKLING2),
    "inkling_text": (4, "attention and mlp in two layers; the short convolutions' own adds are inside the branches"),
    "laguna": (4, "attention and mlp in two layers; the sum with the shared expert is inside the mlp"),
    "minimax_m3_vl": (4, "the sum with the shared expert is inside the mlp"),
    "minimax_m3_vl_text": (4, "the sum with the shared expert is inside the mlp"),
    "mobilebert": (
        8,
        "three feed-forwards and the output in two layers; the attention reads other bottlenecks than the one it is "
        "added to, the wide stream goes around the four, and a NoNorm adds a bias",
    ),
    "mobilenet_v2": (10, "ten of the seventeen blocks keep width and size"),
    "mobilevit": (20, "attention and mlp in nine layers, and two of the inverted residuals keep width and size"),
    "mobilevitv2": (19, "attention and mlp in nine layers, and one of the inverted residuals keeps width and size"),
    "muse_spark_text": (4, "attention and mlp in two layers; a gate weighs stream and branch in a module of its own"),
    "nemotron3_5_transcribe_word_timestamp": (
        4,
        "attention and mlp in two layers; the input is added behind them, a long skip",
    ),
    "pe_audio": (21, "three units in four blocks of the codec, one in the patches, attention and mlp in 2 + 2 layers"),
    "pe_audio_encoder": (
        17,
        "three units in four blocks of the codec, one in the patches, attention and mlp in 2 layers",
    ),
    "pegasus_x": (
        12,
        "2 x 2 encoder, 2 x 3 decoder, and of the global tokens' stream attention and mlp of the first layer: what the "
        "last layer does with it is read by nothing",
    ),
    "perceiver": (6, "attention and mlp in the cross-attention and the two self-attentions of a block"),
    "pix2struct": (10, "2 x 2 encoder, 2 x 3 decoder; what else is added in a decoder layer is a tuple of outputs"),
    "pp_lcnet_v3": (0, "parallel convolutions are added, none of them is a carrier"),
    "pp_lcnet_v4": (11, "two of the thirteen blocks change the width and have no residual"),
    "pp_ocrv6_small_rec": (11, "two of the thirteen blocks change the width and have no residual"),
    "pp_ocrv6_tiny_rec": (11, "two of the thirteen blocks change the width and have no residual"),
    "recurrent_gemma": (4, "mixer and mlp in two layers; the first add has other names"),
    "regnet": (4, NEW_STREAM),
    "resnet": (4, NEW_STREAM),
    "rt_detr_resnet": (4, NEW_STREAM),
    "sam3_lite_text_text_model": (4, "mixer and mlp in two layers; two branches under batch norms have no carrier"),
    "swiftformer": (16, "four adds a stage: convolution, local representation, attention, mlp"),
    "swin2sr": (24, "attention and mlp in two layers of six stages; the stage's own add goes around its four"),
    "timesfm2_5": (4, "attention and mlp in two layers; the patches' block adds two projections"),
    "univnet": (18, "3 x 2 in the kernel predictors, 3 x 4 in the blocks"),
    "zaya": (4, "attention and mlp in two layers, in the module that scales and shifts both summands"),
}
