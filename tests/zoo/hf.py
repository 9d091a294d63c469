"""Builders of tiny Hugging Face models: one function for each kind of input, everything from a configuration.

Nothing downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from tests.zoo import base
from tests.zoo.base import HEADS, HIDDEN, LAYERS, LENGTH, VOCAB, Example

Inputs = Callable[[int, Any], Mapping[str, Any]]

SMALL_TEXT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Shape of the usual decoder configuration; the families that use other names override it as a whole."""


def text_inputs(seed: int, config: Any) -> Mapping[str, Any]:
    """input_ids int64 [B, S]."""
    return {"input_ids": base.tokens(seed, vocab=config.get_text_config().vocab_size)}


def encoder_decoder_inputs(seed: int, config: Any) -> Mapping[str, Any]:
    """input_ids int64 [B, S] and decoder_input_ids int64 [B, S // 2]."""
    ids = base.tokens(seed, vocab=config.vocab_size)
    return {
        "input_ids": ids,
        "decoder_input_ids": base.tokens(seed, length=LENGTH // 2, vocab=config.vocab_size, name="decoder"),
    }


def image_inputs(seed: int, config: Any) -> Mapping[str, Any]:
    """pixel_values float32 [B, channels, size, size]."""
    vision = getattr(config, "vision_config", config)
    return {"pixel_values": base.noise(seed, base.BATCH, vision.num_channels, vision.image_size, vision.image_size)}


def image_text_inputs(seed: int, config: Any) -> Mapping[str, Any]:
    """input_ids and pixel_values, as a contrastive model takes them."""
    return {"input_ids": base.tokens(seed, vocab=config.text_config.vocab_size), **image_inputs(seed, config)}


def build(
    seed: int, config: transformers.PreTrainedConfig, model_class: str, inputs: Inputs, **from_config: object
) -> Example:
    """A finished Example of ``transformers.<model_class>`` (an Auto class or a concrete one) for this configuration."""
    torch.manual_seed(seed)
    factory = getattr(transformers, model_class)
    # Auto classes build through from_config, concrete classes through _from_config: both take the attention and
    # experts choices.
    make = factory.from_config if model_class.startswith("Auto") else factory._from_config
    model: nn.Module = base.finish(make(config, **from_config), seed)
    return Example(model, inputs(seed, config), base.projection_loss)


def builder(
    model_type: str, model_class: str = "AutoModelForCausalLM", inputs: Inputs = text_inputs, **settings: Any
) -> Callable[[int], Example]:
    """seed -> Example. ``settings`` go to the configuration class, those of ``from_config`` under the key "build"."""
    from_config = settings.pop("build", {})

    def make(seed: int) -> Example:
        config = transformers.AutoConfig.for_model(model_type, **settings)
        return build(seed, config, model_class, inputs, **from_config)

    return make


def decoder(model_type: str, **settings: Any) -> Callable[[int], Example]:
    """A causal language model whose configuration uses the usual names."""
    return builder(model_type, **{**SMALL_TEXT, **settings})
