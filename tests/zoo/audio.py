"""Audio models of the published list."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from tests.zoo import base, hf
from tests.zoo.base import BATCH, Entry, Example
from tests.zoo.text import BART_NAMES, CROSS, bart_sites

_WHISPER = {
    **{k: v for k, v in BART_NAMES.items() if k != "max_position_embeddings"},
    "num_mel_bins": 16,
    "max_source_positions": 16,
    "max_target_positions": 32,
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}


def _mel(seed: int, config: Any) -> Mapping[str, Any]:
    """input_features float32 [B, mel bins, 2 x max_source_positions]."""
    return {"input_features": base.noise(seed, BATCH, config.num_mel_bins, 2 * config.max_source_positions)}


def _mel_and_text(seed: int, config: Any) -> Mapping[str, Any]:
    return {**_mel(seed, config), "decoder_input_ids": base.tokens(seed, length=6, vocab=config.vocab_size)}


def _encoder(seed: int) -> Example:
    """The encoder of Whisper, taken out of the whole model (it has no Auto class)."""
    whole = hf.builder("whisper", "WhisperModel", _mel, **_WHISPER)(seed)
    return Example(whole.model.get_submodule("encoder"), whole.inputs, whole.loss)


def encoder_sites(model: nn.Module) -> int:
    """Attention and feed-forward of each encoder layer; the position add is no site."""
    config: Any = model.config
    return 2 * int(config.encoder_layers)


ENTRIES: list[Entry] = [
    Entry("whisper-encoder", "audio", _encoder, encoder_sites, "2 x encoder_layers (attention, feed-forward)"),
    Entry(
        "whisper",
        "audio",
        hf.builder("whisper", "WhisperForConditionalGeneration", _mel_and_text, **_WHISPER),
        bart_sites,
        CROSS,
        notes="convolution stem, two chains",
    ),
]
