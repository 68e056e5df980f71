"""Tokens by an original vision transformer, read by its own code: original_features.py CHECKOUT OUTPUT SETTINGS.

Settings: "file" is a checkpoint, "key" the network in it, "model" the arguments of VisionTransformer, "sizes" those of
the images. OUTPUT gets the images and, for each of them, the tokens after the final LayerNorm of every block.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from upstream import stand_ins


@torch.no_grad()
def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    """Load as the repository's own evaluation does, and run."""
    stand_ins.install(crop_sizes=[16], images=1)
    sys.path.insert(0, checkout)
    options = settings["model"] | {"norm_layer": partial(nn.LayerNorm, eps=1e-6)}  # that of the published models
    if Path(checkout).name == "msn":
        import linear_eval
        from src.deit import VisionTransformer

        model = VisionTransformer(**options)
        model.fc = None
        linear_eval.load_pretrained(settings["file"], model, None, "cpu")
    elif Path(checkout).name == "dinov2":
        from dinov2.models.vision_transformer import DinoVisionTransformer

        model = DinoVisionTransformer(**settings["model"])
        model.load_state_dict(torch.load(settings["file"]))
    else:
        if Path(checkout).name == "ibot":
            from models import VisionTransformer
        else:
            from vision_transformer import VisionTransformer
        import utils

        model = VisionTransformer(**options)
        utils.load_pretrained_weights(model, settings["file"], settings["key"], None, None)
    images = [torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)) for size in settings["sizes"]]
    torch.save({"images": images, "tokens": [tokens(model.eval(), image) for image in images]}, output)


def tokens(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What the blocks give, each after the final LayerNorm; no method of MSN returns patches."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda block, args, output: found.append(output)) for block in model.blocks]
    cls = model(images)  # of DINOv2, too
    for hook in hooks:
        hook.remove()
    normalized = [model.norm(hidden) for hidden in found]
    assert torch.equal(normalized[-1][:, 0], cls)
    return normalized


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
