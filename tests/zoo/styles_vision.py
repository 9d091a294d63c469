"""Plain PyTorch vision and diffusion models: layer scale, long skips, gated adaLN, channels-first streams.

No stream at all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from tests.zoo.base import HEADS, HIDDEN, LAYERS, VOCAB
from tests.zoo.styles_blocks import Attention, Block, FeedForward


class LayerScale(nn.Module):
    """x * gamma, as timm writes it."""

    def __init__(self, init: float = 1e-1) -> None:
        super().__init__()
        self.gamma = nn.Parameter(init * torch.ones(HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class TimmBlock(nn.Module):
    """x = x + drop_path1(ls1(attn(norm1(x)))); the same with the feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.ls1, self.drop_path1 = (
            nn.LayerNorm(HIDDEN),
            Attention(causal=False),
            LayerScale(),
            nn.Identity(),
        )
        self.norm2, self.mlp, self.ls2, self.drop_path2 = (
            nn.LayerNorm(HIDDEN),
            FeedForward(),
            LayerScale(),
            nn.Identity(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class Patches(nn.Module):
    """Image [B, 3, H, W] -> tokens [B, (H/4)(W/4), C]."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, HIDDEN, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        return self.proj(image).flatten(2).transpose(1, 2)


class TimmViT(nn.Module):
    """Class token, learned positions, pre-norm blocks in an nn.Sequential, head on the class token."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = Patches()
        self.cls_token, self.pos_embed = (
            nn.Parameter(torch.zeros(1, 1, HIDDEN)),
            nn.Parameter(torch.zeros(1, 17, HIDDEN)),
        )
        self.blocks = nn.Sequential(*(TimmBlock() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class UBlock(Block):
    """A pre-norm block; in the second half it first merges a long skip by a projection of the concatenation."""

    def __init__(self, skip: bool) -> None:
        super().__init__(causal=False)
        self.skip_linear = nn.Linear(2 * HIDDEN, HIDDEN) if skip else None

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        return super().forward(x)


class UViT(nn.Module):
    """U-ViT: two blocks in, one in the middle, two out.

    A long skip reads the stream after each block of the first half.
    """

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.in_blocks = nn.ModuleList(UBlock(False) for _ in range(2))
        self.mid_block = UBlock(False)
        self.out_blocks = nn.ModuleList(UBlock(True) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 48)

    def forward(self, image: Tensor) -> Tensor:
        x, skips = self.patches(image), []
        for block in self.in_blocks:
            x = block(x)
            skips.append(x)
        x = self.mid_block(x)
        for block in self.out_blocks:
            x = block(x, skips.pop())
        return self.head(self.norm(x))


class DiTBlock(nn.Module):
    """adaLN-zero: shift, scale and gate of each branch come from the conditioning vector. x [B, S, C], c [B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(HIDDEN, elementwise_affine=False), Attention(causal=False)
        self.norm2, self.mlp = nn.LayerNorm(HIDDEN, elementwise_affine=False), FeedForward()
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 6 * HIDDEN))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.modulation(c).chunk(6, dim=1)
        n = self.norm1(x) * (1 + scale_a.unsqueeze(1)) + shift_a.unsqueeze(1)
        x = x + gate_a.unsqueeze(1) * self.attn(n)
        n = self.norm2(x) * (1 + scale_m.unsqueeze(1)) + shift_m.unsqueeze(1)
        return x + gate_m.unsqueeze(1) * self.mlp(n)


class DiT(nn.Module):
    """Diffusion transformer: noisy image, time step and class label in, predicted noise per patch out."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.labels = Patches(), nn.Embedding(10, HIDDEN)
        self.time = nn.Sequential(nn.Linear(32, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN))
        self.blocks = nn.ModuleList(DiTBlock() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.final_modulation, self.head = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(HIDDEN, 48)

    def forward(self, image: Tensor, step: Tensor, label: Tensor) -> Tensor:
        angles = step[:, None].float() * torch.exp(-torch.arange(16, device=step.device) / 2.0)
        c = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.labels(label)
        x = self.patches(image)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(functional.silu(c)).chunk(2, dim=1)
        return self.head(self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1))


class ChannelsFirstBlock(nn.Module):
    """A convolution on [B, C, H, W], then attention on [B, HW, C].

    The stream changes its layout between the two adds.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, HIDDEN)
        self.depthwise, self.pointwise = (
            nn.Conv2d(HIDDEN, HIDDEN, 3, padding=1, groups=HIDDEN),
            nn.Conv2d(HIDDEN, HIDDEN, 1),
        )
        self.ln, self.attn = nn.LayerNorm(HIDDEN), Attention(causal=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pointwise(functional.gelu(self.depthwise(self.norm(x))))
        batch, width, height, _ = x.shape
        t = x.flatten(2).transpose(1, 2)
        t = t + self.attn(self.ln(t))
        return t.transpose(1, 2).reshape(batch, width, height, -1)


class ChannelsFirst(nn.Module):
    """A stem, such blocks, mean pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, HIDDEN, 4, stride=4)
        self.blocks = nn.Sequential(*(ChannelsFirstBlock() for _ in range(LAYERS)))
        self.head = nn.Linear(HIDDEN, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(image)).mean(dim=(2, 3)))


class MixerBlock(nn.Module):
    """Token mixing across a transposed view, then channel mixing."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.tokens = nn.LayerNorm(HIDDEN), FeedForward(16)
        self.norm2, self.channels = nn.LayerNorm(HIDDEN), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()
        self.blocks = nn.ModuleList(MixerBlock() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


class TorchTransformer(nn.Module):
    """nn.TransformerEncoder, and nn.TransformerDecoder if asked for, on embedded tokens."""

    def __init__(self, norm_first: bool, decoder: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.position = nn.Parameter(torch.zeros(1, 64, HIDDEN))
        layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, 2 * HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
        # The nested-tensor path is for padded inference of post-norm layers; it would only print a warning here.
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.decoder: nn.TransformerDecoder | None = None
        if decoder:
            block = nn.TransformerDecoderLayer(HIDDEN, HEADS, 2 * HIDDEN, 0.0, batch_first=True, norm_first=norm_first)
            self.decoder = nn.TransformerDecoder(block, LAYERS)

    def forward(self, ids: Tensor, target: Tensor | None = None) -> Tensor:
        x = self.encoder(self.embed(ids) + self.position[:, : ids.shape[1]])
        if self.decoder is not None and target is not None:
            x = self.decoder(self.embed(target) + self.position[:, : target.shape[1]], x)
        return self.head(x)


class NoStream(nn.Module):
    """A plain feed-forward network: nothing to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        self.layers = nn.Sequential(FeedForward(), nn.LayerNorm(HIDDEN), FeedForward())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(ids)))
