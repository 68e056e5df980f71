"""Tokens by an original vision transformer, read by its own code: original_features.py CHECKOUT OUTPUT SETTINGS.

Settings: "file" is a checkpoint, "key" the network in it, "model" the arguments of VisionTransformer, "sizes" those of
the images. Of DINOv2 and DINOv3 a file with random weights is written where there is none. OUTPUT gets the images and,
for each of them, the tokens after the final LayerNorm of every block.
"""

import importlib
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
    elif Path(checkout).name in ("dinov2", "dinov3"):
        module: Any = importlib.import_module(f"{Path(checkout).name}.models.vision_transformer")
        model = module.DinoVisionTransformer(**settings["model"])
        if not Path(settings["file"]).exists():
            model.init_weights()
            generator = torch.Generator().manual_seed(0)
            for parameter in model.parameters():  # many are 0 or tiny
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            torch.save(model.state_dict(), settings["file"])
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
    if hasattr(model, "rope_embed"):  # DINOv3, whose blocks take and return lists
        layers = model.get_intermediate_layers(
            images, n=model.n_blocks, return_class_token=True, return_extra_tokens=True
        )
        return [torch.cat([cls[:, None], extra, patches], dim=1) for patches, cls, extra in layers]
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
