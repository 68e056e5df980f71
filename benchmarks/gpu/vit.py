"""A vision transformer of torch's own layers, so that a whole training step needs nothing but torch."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VisionTransformer(nn.Module):
    """Images (B, 3, H, W) -> their [CLS] tokens (B, `dim`); H and W are multiples of `patch`."""

    def __init__(self, dim: int, heads: int, layers: int, *, side: int, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(0.02 * torch.randn(1, 1, dim))
        self.positions = nn.Parameter(0.02 * torch.randn(1, dim, side // patch, side // patch))
        layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, nn.LayerNorm(dim), enable_nested_tensor=False)

    def forward(self, images: Tensor) -> Tensor:
        """Positions are interpolated where the images are smaller than `side`."""
        patches = self.patches(images)
        positions = F.interpolate(self.positions, patches.shape[2:], mode="bicubic")
        tokens = (patches + positions).flatten(2).transpose(1, 2)
        return self.encoder(torch.cat([self.cls.expand(len(images), -1, -1), tokens], dim=1))[:, 0]
