"""A backbone with a linear classifier, trained as a whole."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from evaluators.features.encoder import Encoder
from methods.backbone import add_drop_path

TOKENS = ("cls_token", "position_embeddings", "mask_token", "register_tokens")


class Classifier(nn.Module):
    """A trainable copy of an encoder's model and a linear head on [CLS] or the mean patch token.

    Args:
        encoder: stays as it is.
        classes: number of classes.
        mean_patch: classify the mean of the patch tokens, after the final LayerNorm, in place of [CLS].
        drop_path: rate of stochastic depth in the last block, rising linearly from 0 in the first.
        head_scale: the head's weights are drawn with standard deviation 0.02 times this, its biases are 0.
    """

    def __init__(
        self, encoder: Encoder, classes: int, *, mean_patch: bool = False, drop_path: float, head_scale: float = 1.0
    ) -> None:
        super().__init__()
        self.model = copy.deepcopy(encoder.model).requires_grad_(True)
        self.head = nn.Linear(encoder.dim, classes, device=self.model.device)
        nn.init.trunc_normal_(self.head.weight, std=0.02 * head_scale)
        nn.init.zeros_(self.head.bias)
        self.mean_patch, self._encoder = mean_patch, dataclasses.replace(encoder, model=self.model)
        add_drop_path(self.blocks, drop_path)
        self._freeze_unused(encoder)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the model, whatever it calls them."""
        lists = (part for part in self.model.modules() if isinstance(part, nn.ModuleList))
        return next(part for part in lists if len(part) == self._encoder.depth)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, 3, H, W)."""
        tokens = self._encoder.layers(images)[0]
        return self.head(tokens[:, 1:].mean(dim=1) if self.mean_patch else tokens[:, 0])

    def _freeze_unused(self, encoder: Encoder) -> None:
        # A mask token or a pooler gets no gradient, for which DDP would wait.
        side = encoder.image_size
        self(torch.zeros(1, 3, side, side, device=self.model.device)).sum().backward()
        for parameter in self.parameters():
            parameter.requires_grad_(parameter.grad is not None)
        self.zero_grad(set_to_none=True)


def layer_decay_groups(classifier: Classifier, *, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups for an optimiser, with an `lr_scale` each, as in BEiT.

    The scale is 1 for the head and the final LayerNorm and falls by the factor `layer_decay` with every block below,
    down to `layer_decay` ** (depth + 1) for the embeddings. Biases, other 1-D parameters, tokens and position
    embeddings are not decayed.
    """
    depth = len(classifier.blocks)
    level = {id(parameter): 0 for parameter in classifier.model.embeddings.parameters()}
    for number, block in enumerate(classifier.blocks, start=1):
        level |= {id(parameter): number for parameter in block.parameters()}
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in classifier.named_parameters():
        if parameter.requires_grad:
            decayed = parameter.ndim > 1 and not name.endswith((".bias", *TOKENS))
            groups.setdefault((level.get(id(parameter), depth + 1), decayed), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr_scale": layer_decay ** (depth + 1 - number),
            "weight_decay": weight_decay if decayed else 0.0,
        }
        for (number, decayed), parameters in groups.items()
    ]
