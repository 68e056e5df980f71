"""Position embeddings at other resolutions, as the code of DINO, iBOT and DINOv2 interpolates them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings


def interpolate_as_dino(model: PreTrainedModel) -> None:
    """Make a ViTModel or Dinov2Model interpolate its position embeddings as the code it was published with.

    DINO, iBOT and DINOv2 without registers add 0.1 to the number of patches before they compute the scale. MSN, DINOv2
    with registers and transformers do not, so features at other resolutions than that of the position embeddings differ
    by far more than rounding.
    """
    embeddings = {ViTEmbeddings: DINOEmbeddings, Dinov2Embeddings: DINOv2Embeddings}
    model.embeddings.__class__ = embeddings[type(model.embeddings)]  # nothing but a method differs


class _Interpolation(nn.Module):
    position_embeddings: nn.Parameter

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the position embeddings (1, 1 + h*w, D) of images of `height` x `width` px."""
        patch_size = self.patch_embeddings.projection.stride[0]
        h, w = height // patch_size, width // patch_size
        side = math.isqrt(self.position_embeddings.shape[1] - 1)
        if (h, w) == (side, side):
            return self.position_embeddings
        positions = self.position_embeddings.float()
        grid = positions[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
        scale = ((h + 0.1) / side, (w + 0.1) / side)
        grid = nn.functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        positions = torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
        return positions.to(self.position_embeddings.dtype)


class DINOEmbeddings(_Interpolation, ViTEmbeddings):
    """Position embeddings of DINO and iBOT."""


class DINOv2Embeddings(_Interpolation, Dinov2Embeddings):
    """Position embeddings of DINOv2 without registers."""
