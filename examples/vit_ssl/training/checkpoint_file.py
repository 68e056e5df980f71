"""The file that training continues from, OUTPUT/checkpoint.pt: always a whole one, with the one before it beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from config.recipe import recipe_from_dict

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Replace DIRECTORY/checkpoint.pt atomically: whenever the process dies, a whole checkpoint is there.

    `state` holds `recipe`, `method` (a state dict), `step`, `epoch` and what training needs besides. The checkpoint
    that is replaced stays as checkpoint.previous.pt on file systems that have hard links.
    """
    path, previous = directory / CHECKPOINT, directory / PREVIOUS
    partial = directory / f"{CHECKPOINT}.partial"
    with partial.open("wb") as file:
        torch.save({**state, "recipe": dataclasses.asdict(state["recipe"])}, file)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        with contextlib.suppress(OSError):
            previous.unlink(missing_ok=True)
            previous.hardlink_to(path)
    partial.replace(path)


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """Return the training state in DIRECTORY/checkpoint.pt, on the CPU; no code in the file is executed.

    Raises FileNotFoundError where there is none, and OSError, with what to do, for a damaged one.
    """
    path = Path(directory) / CHECKPOINT
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: expected the --output directory of a pretraining run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError) as error:  # of the zip file that a checkpoint is
        advice = f"; mv {path.with_name(PREVIOUS)} {path}" if path.with_name(PREVIOUS).is_file() else ""
        raise OSError(f"{path} is damaged ({str(error).splitlines()[0]}){advice}") from error
    state["recipe"] = recipe_from_dict(state["recipe"], source=str(path))
    return state
