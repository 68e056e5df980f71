"""A frozen backbone as the evaluations use it, from a run or from whatever `open_backbone` opens."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from backbones.open_backbone import SOURCES, open_backbone
from methods.backbone import pooled
from training.checkpoint_file import CHECKPOINT


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A frozen vision transformer with a [CLS] token, in eval mode and without gradients of its weights."""

    model: PreTrainedModel
    """A transformers ViTModel, ViTMSNModel, Dinov2Model, ..."""
    source: str
    """The name or path that the user gave."""
    patch_size: int
    """Side of a patch in px."""
    dim: int
    """Width D of the features."""
    depth: int
    """Number of blocks."""
    image_size: int
    """Side in px at which images are evaluated."""
    key: str = "teacher"
    """The name of the network that was read, where the file is an original .pth file."""
    has_patches: ClassVar[bool] = True
    """Whether there are patch tokens beside [CLS]."""

    def layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Return the tokens of the last `n` blocks, the last one last, each after the final LayerNorm: (B, 1 + h*w, D).

        `images` (B, 3, H, W) with H and W any multiples of the patch size; position embeddings are interpolated. The
        first token is [CLS], then come the patches row by row; register tokens are left out. Raises ValueError when
        there are no `n` blocks or the images are no whole number of patches.
        """
        if not 1 <= n <= self.depth:
            raise ValueError(f"`n` (={n}) must be in 1 ... {self.depth}, the number of blocks")
        if any(side % self.patch_size for side in images.shape[-2:]):
            height, width = images.shape[-2:]
            raise ValueError(f"`images` (={height} x {width} px) must be multiples of the patch size {self.patch_size}")
        parameters = inspect.signature(self.model.forward).parameters
        options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in parameters else {}
        output = self.model(pixel_values=images, output_hidden_states=n > 1, **options)
        norm = final_norm(self.model)
        # The hidden states are those before the final LayerNorm, that of the last block too.
        earlier = [norm(hidden) for hidden in output.hidden_states[-n:-1]] if n > 1 else []
        return [self._without_registers(tokens) for tokens in [*earlier, output.last_hidden_state]]

    def cls(self, images: Tensor) -> Tensor:
        """Return the [CLS] token of the last block: images (B, 3, H, W) -> (B, D)."""
        return self.layers(images)[0][:, 0]

    def patches(self, images: Tensor) -> Tensor:
        """Return the patch tokens of the last block: images (B, 3, H, W) -> (B, H / patch_size, W / patch_size, D)."""
        height, width = (side // self.patch_size for side in images.shape[-2:])
        return self.layers(images)[0][:, 1:].unflatten(1, (height, width))

    def _without_registers(self, tokens: Tensor) -> Tensor:
        registers = getattr(self.model.config, "num_register_tokens", 0)
        return torch.cat([tokens[:, :1], tokens[:, 1 + registers :]], dim=1) if registers else tokens


@dataclasses.dataclass(frozen=True)
class PooledEncoder(Encoder):
    """A frozen convolutional network: `methods.backbone.pooled` stands for [CLS], and there are no patch tokens.

    It counts as one block, and takes images of any size: its `patch_size` is 1.
    """

    has_patches: ClassVar[bool] = False

    def layers(self, images: Tensor, n: int = 1) -> list[Tensor]:
        """Return the features of images (B, 3, H, W) as the only token of the only block: [(B, 1, D)]."""
        if n != 1:
            raise ValueError(f"`n` (={n}) must be 1: a convolutional network has its pooled features alone")
        return [pooled(self.model, images).unsqueeze(1)]

    def patches(self, images: Tensor) -> Tensor:
        """Raise ValueError: there are none."""
        raise ValueError(f"{self.source!r} ({type(self.model).__name__}) has no patch tokens")


def open_encoder(
    source: str | Path, device: torch.device | str = "cpu", *, key: str = "teacher", heads: int | None = None
) -> Encoder:
    """Open a backbone for evaluation, in float32, as `open_backbone` does, and raise what that raises.

    One of our own runs is opened by `request.open_evaluation` instead. A convolutional network of transformers, as
    ResNet and ConvNeXt, gives its pooled output.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise FileNotFoundError(
            f"`source` (={str(source)!r}) holds neither {CHECKPOINT} nor config.json: give the --output directory of "
            f"pretrain.py, {SOURCES}"
        )
    model: PreTrainedModel = open_backbone(str(source), key=key, heads=heads)
    encoder = as_encoder(model.to(device), str(source))
    return dataclasses.replace(encoder, key=key) if Path(source).is_file() else encoder


def as_encoder(model: PreTrainedModel, source: str, *, image_size: int | None = None) -> Encoder:
    """Wrap a transformers model, evaluated at `image_size` px (None: the size in its configuration, or else 224).

    Freezes the model and sets it to eval mode. Raises ValueError when it is neither a vision transformer with [CLS] and
    patch tokens nor a convolutional network with a pooled output.
    """
    config = model.config
    if hasattr(config, "hidden_sizes"):  # one for each stage of a convolutional network
        return _as_pooled_encoder(model, source, image_size)
    try:
        patch_size, dim, depth = _side(config.patch_size), config.hidden_size, config.num_hidden_layers
        own_size = _side(config.image_size)
        final_norm(model)
    except AttributeError as error:
        raise ValueError(f"{source!r} ({type(model).__name__}) is no vision transformer: {error}") from error
    # DINOv2 ends its training at 518 px, but its classification is evaluated at 224 px (Oquab et al., 2023).
    own_size = 224 if config.model_type.startswith("dinov2") and own_size == 518 else own_size
    encoder = Encoder(model.requires_grad_(False).eval(), source, patch_size, dim, depth, image_size or own_size)
    with torch.no_grad():
        tokens = encoder.layers(torch.zeros(1, 3, 2 * patch_size, 3 * patch_size, device=model.device))[0]
    if tokens.shape != (1, 1 + 2 * 3, dim):
        raise ValueError(f"{source!r} ({type(model).__name__}) must give a [CLS] token and one token per patch")
    return encoder


def _as_pooled_encoder(model: PreTrainedModel, source: str, image_size: int | None) -> PooledEncoder:
    model.requires_grad_(False).eval()
    size = image_size or _side(getattr(model.config, "image_size", 224))
    if (grid := getattr(model.config, "feature_grid", 1)) not in range(1, 65):
        raise ValueError(f"`feature_grid` (={grid!r}) of {source!r} must be in 1 ... 64")
    try:
        with torch.no_grad():
            dim = pooled(model, torch.zeros(1, 3, 64, 64, device=model.device)).shape[1]
    except AttributeError as error:
        raise ValueError(f"{source!r} ({type(model).__name__}) must give one pooled output per image") from error
    return PooledEncoder(model, source, 1, dim, 1, size)


def reinitialized(encoder: Encoder, seed: int = 0) -> Encoder:
    """Return the same architecture with random weights drawn from `seed`: what pretraining must beat."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = type(encoder.model)(encoder.model.config)
    # The source is another one, because what else the file holds, such as a head, does not belong to these weights.
    source = f"{encoder.source} with random weights"
    return as_encoder(model.to(encoder.model.device), source, image_size=encoder.image_size)


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return the LayerNorm after the last block; `layernorm` in transformers' ViTs, `norm` in its DINOv3."""
    return model.layernorm if hasattr(model, "layernorm") else model.norm


def _side(size: int | list[int] | tuple[int, int]) -> int:
    if isinstance(size, int):
        return size
    height, width = size
    if height != width:
        raise ValueError(f"images and patches must be square, not {height} x {width} px")
    return height
