"""The shapes of all weights of original vision transformers: original_shapes.py CHECKOUT OUTPUT SETTINGS.

Settings: "models" holds (module, factory, options) of each, as tests/published_vits.py has them. They are built on the
meta device, which has no memory. OUTPUT gets a list of {name: shape}, as JSON.
"""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from upstream import stand_ins


def main(checkout: str, output: str, settings: dict[str, Any]) -> None:
    """Build them as the repository's own torch.hub entries do, without weights."""
    stand_ins.install(crop_sizes=[16], images=1)
    torch.linspace = partial(torch.linspace, device="cpu")  # of rates that the models read as numbers
    sys.path.insert(0, checkout)
    found = []
    for name, factory, options in settings["models"]:
        module: Any = importlib.import_module(name)
        if hasattr(module, "Weights"):
            options = {
                "pretrained": False,
                "weights": module.Weights[options.get("weights", next(iter(module.Weights)).name)],
            }
        with torch.device("meta"):
            model = getattr(module, factory)(**options)
        found.append({name: list(value.shape) for name, value in model.state_dict().items()})
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
