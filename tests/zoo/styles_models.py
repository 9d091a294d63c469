"""The entries of the plain PyTorch styles: which model, which inputs, how many sites and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tests.zoo import base
from tests.zoo import styles_text as text
from tests.zoo import styles_vision as vision
from tests.zoo.base import BATCH, HIDDEN, LENGTH, VOCAB, Entry, Example

Inputs = Callable[[int], Mapping[str, Any]]


def _ids(seed: int) -> Mapping[str, Any]:
    return {"ids": base.tokens(seed)}


def _image(seed: int) -> Mapping[str, Any]:
    return {"image": base.noise(seed, BATCH, 3, 16, 16)}


def _build(make: Callable[[], nn.Module], inputs: Inputs) -> Callable[[int], Example]:
    def build(seed: int) -> Example:
        torch.manual_seed(seed)
        return Example(base.finish(make(), seed), inputs(seed), base.projection_loss)

    return build


def per_block(attribute: str, sites: int) -> Callable[[nn.Module], int]:
    """The rule "sites x length of the model's list of blocks"."""
    return lambda model: sites * len(list(model.get_submodule(attribute).children()))


def _blocks_of(block: type[nn.Module]) -> Callable[[], nn.Module]:
    """A NanoGPT whose layers are of this class."""

    class Model(text.NanoGPT):
        def block(self) -> nn.Module:
            return block()

    return Model


def _text(name: str, make: Callable[[], nn.Module], notes: str, sites: int = 2, blocks: str = "h") -> Entry:
    return Entry(name, "style", _build(make, _ids), per_block(blocks, sites), f"{sites} x blocks", notes=notes)


def _vision(name: str, make: Callable[[], nn.Module], notes: str) -> Entry:
    return Entry(name, "style", _build(make, _image), per_block("blocks", 2), "2 x blocks", notes=notes)


def _u_vit_sites(model: nn.Module) -> int:
    return 2 * (per_block("in_blocks", 1)(model) + 1 + per_block("out_blocks", 1)(model))


def _wrapped_sites(model: nn.Module) -> int:
    return sum(isinstance(child, text.Residual) for child in model.children())


def _encoder_decoder_sites(model: nn.Module) -> int:
    return per_block("encoder.layers", 2)(model) + per_block("decoder.layers", 3)(model)


def _dit_inputs(seed: int) -> Mapping[str, Any]:
    return {**_image(seed), "step": torch.tensor([3, 8]), "label": torch.tensor([1, 4])}


ENTRIES: list[Entry] = [
    _text("nanogpt", text.NanoGPT, "tied head"),
    _text("titan-llama", text.TitanLlama, "complex rotary embedding, layers in a ModuleDict", blocks="layers"),
    _text("parallel", _blocks_of(text.ParallelBlock), "x + attn + mlp is one site", sites=1),
    _text(
        "spellings",
        _blocks_of(text.SpelledBlock),
        "torch.add with alpha, += on the branch, branch first, add_",
        sites=4,
    ),
    _text("scaled-carrier", _blocks_of(text.ScaledCarrierBlock), "a * x + b * f(x)"),
    _text("checkpointed", _blocks_of(text.CheckpointedBlock), "adds inside checkpoint bodies"),
    _text("wide-stream", text.WideStream, "float64 stream, float32 branches"),
    _text("early-exits", text.EarlyExits, "every layer's stream is read outside the branches"),
    _text("hidden-states", text.HiddenStates, "residual values returned"),
    _text("injected-embedding", text.InjectedEmbedding, "x = a x + b x0 between blocks"),
    _text("packed", text.Packed, "stream [T, C]", sites=1, blocks="blocks"),
    _text("mamba-like", _blocks_of(text.Mamba), "one mixer a layer; D * x inside it", sites=1),
    Entry(
        "shared-layers",
        "style",
        _build(text.SharedLayers, _ids),
        lambda model: 3 * per_block("h", 2)(model),
        "2 x blocks x 3 uses",
        notes="each use of the shared layer is a site of its own",
    ),
    Entry(
        "wrapped-sequential",
        "style",
        _build(text.wrapped_sequential, lambda seed: {"input": base.tokens(seed)}),
        _wrapped_sites,
        "1 x Residual wrappers",
        notes="f(x) + x",
    ),
    Entry(
        "deepstack",
        "style",
        _build(text.DeepStack, lambda seed: {**_ids(seed), "features": base.noise(seed, 2, BATCH, LENGTH, HIDDEN)}),
        per_block("h", 2),
        "2 x blocks; the added features depend on no stream",
    ),
    _vision("timm-vit", vision.TimmViT, "layer scale, drop path, class token"),
    Entry(
        "u-vit",
        "style",
        _build(vision.UViT, _image),
        _u_vit_sites,
        "2 x (in + mid + out blocks)",
        notes="a long skip is a reader; the merging projection ends one chain and begins the next",
    ),
    Entry(
        "dit", "diffusion", _build(vision.DiT, _dit_inputs), per_block("blocks", 2), "2 x blocks", notes="gated adaLN"
    ),
    _vision("channels-first", vision.ChannelsFirst, "[B, C, H, W] and [B, HW, C] in one stream"),
    _vision("mlp-mixer", vision.Mixer, "token mixing across a transpose"),
    Entry(
        "nn-transformer-encoder",
        "encoder",
        _build(lambda: vision.TorchTransformer(norm_first=True), _ids),
        per_block("encoder.layers", 2),
        "2 x layers",
        notes="norm_first=True",
    ),
    Entry(
        "nn-transformer-decoder",
        "encoder-decoder",
        _build(
            lambda: vision.TorchTransformer(norm_first=True, decoder=True),
            lambda seed: {**_ids(seed), "target": base.tokens(seed, length=6, name="target")},
        ),
        _encoder_decoder_sites,
        "2 x encoder layers + 3 x decoder layers",
        notes="norm_first=True",
    ),
    Entry(
        "nn-transformer-encoder-post-norm",
        "encoder",
        _build(lambda: vision.TorchTransformer(norm_first=False), _ids),
        per_block("encoder.layers", 2),
        "2 x layers",
        status="refused",
        reason="post-norm",
        options={"post_norm": "per_stream"},
    ),
    Entry(
        "no-stream",
        "style",
        _build(vision.NoStream, _ids),
        lambda model: 0,
        "0: nothing is added to anything",
        status="refused",
        reason="no residual",
        notes=f"vocabulary {VOCAB}, so that the output is wider than the stream",
    ),
]
