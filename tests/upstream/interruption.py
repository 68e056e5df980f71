"""Stops a training between two epochs or steps and continues it from what it saved, as its script does not."""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


def loop(
    times: Sequence[int], parts: Mapping[str, Any], settings: Mapping[str, Any], result: dict[str, Any]
) -> Iterator[int]:
    """These epochs or steps, and after the last one a checkpoint in `result`.

    Settings: "resume" names the file of a checkpoint to begin with, "first" is the one to continue with, and "stop_at"
    the one to stop before. `parts` have a state dict each.
    """
    if settings.get("resume"):
        checkpoint = torch.load(settings["resume"], weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["torch"])
        random.setstate(checkpoint["python"])
    yield from times[settings.get("first", 0) : settings.get("stop_at")]
    states = {name: part.state_dict() for name, part in parts.items()}
    result["checkpoint"] = copy.deepcopy(states | {"torch": torch.get_rng_state(), "python": random.getstate()})
