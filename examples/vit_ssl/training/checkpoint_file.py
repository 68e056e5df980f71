"""The file that training continues from, OUTPUT/checkpoint.pt: always a whole one, with the one before it beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config.recipe import recipe_from_dict
from storage.torch_file import UnreadableFile, is_stored, read_torch_file
from storage.whole_file import to_disk, whole_file

CHECKPOINT = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"


def save_checkpoint(directory: Path, state: dict[str, Any]) -> None:
    """Replace DIRECTORY/checkpoint.pt atomically: whenever the process dies, a whole checkpoint is there.

    `state` holds `recipe`, `method` (a state dict), `step`, `epoch` and what training needs besides. The checkpoint
    that is replaced stays as checkpoint.previous.pt on file systems that have hard links.

    Raises:
        FloatingPointError: a weight is not finite; what is there stays.
        OSError: the checkpoint cannot be written, for example because the disk is full; what is there stays.
    """
    path, previous = directory / CHECKPOINT, directory / PREVIOUS
    if wrong := not_finite(state.get("method", {})):
        raise FloatingPointError(f"{wrong} holds NaN or infinity, and is not saved")
    try:
        with whole_file(path) as file:
            torch.save({**state, "recipe": dataclasses.asdict(state["recipe"])}, file)
            to_disk(file)
            if path.exists():
                with contextlib.suppress(OSError):
                    previous.unlink(missing_ok=True)
                    previous.hardlink_to(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except RuntimeError as error:  # of PyTorch's writer, when the file took less than it should
        raise OSError(errno.ENOSPC, f"cannot be written whole ({str(error).splitlines()[0]})", str(path)) from error


def load_checkpoint(directory: Path) -> dict[str, Any]:
    """Return the training state in DIRECTORY/checkpoint.pt, on the CPU; no code in the file is executed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        UnreadableFile: it is damaged, no checkpoint, or holds weights that are not finite; the message says which, and
            whether the one before it can take its place.
    """
    path = Path(directory) / CHECKPOINT
    previous = path.with_name(PREVIOUS)
    if not path.is_file() and not previous.is_file():
        raise FileNotFoundError(f"no checkpoint {path}: expected the --output directory of a pretraining run")
    try:
        return _read(path)
    except (UnreadableFile, FileNotFoundError) as error:
        reason = f"there is no {path}" if isinstance(error, FileNotFoundError) else str(error)
        if not previous.is_file():
            raise UnreadableFile(f"{reason}; there is no {PREVIOUS} beside it") from error
        try:
            step = _read(previous)["step"]
        except UnreadableFile as second:
            raise UnreadableFile(f"{reason}, and {second}") from error
        raise UnreadableFile(f"{reason}; the one before it is whole (step {step}): mv {previous} {path}") from error


def not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, None where there is none."""
    wrong = (name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all())
    return next(wrong, None)


def _read(path: Path) -> dict[str, Any]:
    state = read_torch_file(path)
    foreign = f"{path} is no checkpoint of pretrain.py"
    if not isinstance(state, dict):
        raise UnreadableFile(f"{foreign}: it holds a {type(state).__name__}")
    if missing := {"recipe", "step"} - state.keys():
        raise UnreadableFile(f"{foreign}: it lacks {' and '.join(sorted(missing))}")
    method = state.get("method", {})
    if not isinstance(state["recipe"], dict):
        raise UnreadableFile(f"{foreign}: its `recipe` must be a dict")
    if not isinstance(method, dict) or not all(isinstance(value, Tensor) for value in method.values()):
        raise UnreadableFile(f"{foreign}: its `method` must be a dict of tensors")
    for name, kinds in {"step": int, "epoch": int, "images": int, "seconds": (int, float)}.items():
        if name in state and (not isinstance(state[name], kinds) or state[name] < 0):
            raise UnreadableFile(f"{foreign}: its `{name}` must be a number >= 0")
    if wrong := [name for name, value in method.items() if not is_stored(value)]:
        raise UnreadableFile(f"{foreign}: it does not hold all numbers of {wrong[0]}")
    if wrong := not_finite(method):
        raise UnreadableFile(f"{path} holds weights that are NaN or infinite ({wrong})")
    try:
        state["recipe"] = recipe_from_dict(state["recipe"], source=str(path))
    except (ValueError, AttributeError) as error:
        raise UnreadableFile(f"{foreign} of this version: {error}") from error
    return state
