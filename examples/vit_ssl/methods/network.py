"""What student and teacher are: a backbone and its head, fed with crops of several sizes in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from config.recipe import Recipe
from methods.backbone import build_backbone, features
from vmf_heads import VMFPrototypeHead


class Network(nn.Module):
    """A backbone and the head on its features, a ViT's [CLS] token or a ResNet's last feature map, pooled."""

    def __init__(self, backbone: PreTrainedModel, head: VMFPrototypeHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor], keep: Sequence[Tensor] = ()) -> Any:
        """Return what the head makes of len(crops) * B features, in the order of `crops`, each (B, 3, h, w).

        The first len(keep) crops are seen in part: `keep[i]` (B, n) are the indices of their patches that stay.
        """
        by_kind: dict[tuple[torch.Size, bool], list[int]] = {}
        for index, crop in enumerate(crops):
            by_kind.setdefault((crop.shape, index < len(keep)), []).append(index)
        # One backbone call for each kind of crop and one head call make multi-crop affordable.
        found: dict[int, Tensor] = {}
        for (_, partly), indices in by_kind.items():
            kept = torch.cat([keep[index] for index in indices]) if partly else None
            same_kind = features(self.backbone, torch.cat([crops[index] for index in indices]), keep=kept)
            found.update(zip(indices, same_kind.chunk(len(indices)), strict=True))
        return self.head(torch.cat([found[index] for index in range(len(crops))]))


def build_network(recipe: Recipe, *, drop_path: float = 0.0, output: str = "logits") -> Network:
    """Return a randomly initialised backbone with the head of DINO and MSN; weights come from torch's global generator.

    The backbone is drawn first: `training.run.random_backbone` draws it again from the seed alone.
    """
    backbone = build_backbone(recipe, drop_path=drop_path)
    head = VMFPrototypeHead(
        recipe.feature_size,
        recipe.out_dim,
        use_bn=recipe.use_bn_in_head,
        norm_last_layer=recipe.normalization == "l2",
        nlayers=recipe.head_layers,
        hidden_dim=recipe.hidden_dim,
        bottleneck_dim=recipe.bottleneck_dim,
        normalizer="vmf" if recipe.normalization == "vmf" else "none",
        output=output,
    )
    initialize_mlp(head, recipe.initializer_range)
    return Network(backbone, head)


def initialize_mlp(head: VMFPrototypeHead, std: float) -> None:
    """Draw the head's MLP at the recipe's scale: DINO's 0.02 vanishes in a narrow head."""
    for layer in head.mlp.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
