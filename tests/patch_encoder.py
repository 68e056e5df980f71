"""Stand-ins for a frozen backbone with features that a test can compute by itself."""

from types import SimpleNamespace

import torch
from torch import Tensor


class PatchEncoder:
    """A linear map of each patch's mean colour and pixels; [CLS] is the mean of the patches."""

    has_patches = True

    def __init__(self, patch_size: int, dim: int = 16) -> None:
        generator = torch.Generator().manual_seed(3)
        self.patch_size, self.model = patch_size, SimpleNamespace(device=torch.device("cpu"))
        self.weight = torch.randn(3 * patch_size**2, dim, generator=generator)

    def patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, H / patch_size, W / patch_size, D)."""
        p = self.patch_size
        return images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3) @ self.weight

    def cls(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        return self.patches(images).mean(dim=(1, 2))
