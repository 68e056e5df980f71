"""Whether features are unit vectors: a look at a few rows, without waiting for a GPU more than once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._compiled import is_plain_eager

# A unit vector whose elements are rounded to bfloat16 may be longer or shorter by 4e-3.
_LENGTH_TOLERANCE = 1e-2
_ROWS_LOOKED_AT = 8
_lengths_known: set[tuple[str, torch.device, int]] = set()  # on devices where asking makes the host wait


def unit_rows(name: str, x: Tensor) -> None:
    """An error if one of a few rows of `x` (N, p) is no unit vector.

    Rows of length 0, which is what normalising zeros gives, and rows that are not finite pass. On the CPU this is
    one small reduction. On a GPU it would make the host wait for the device, so only the first call for each name,
    device and p looks there. Inside torch.compile, transforms and CUDA graphs nothing is checked.
    """
    if x.numel() == 0 or not is_plain_eager(x):
        return
    key = (name, x.device, x.shape[1])
    if x.device.type != "cpu" and (key in _lengths_known or torch.cuda.is_current_stream_capturing()):
        return
    step = math.ceil(len(x) / _ROWS_LOOKED_AT)
    lengths = torch.linalg.vector_norm(x.detach()[::step].float(), dim=1).tolist()
    wrong = [length for length in lengths if length != 0 and _LENGTH_TOLERANCE < abs(length - 1) < math.inf]
    if wrong:
        raise ValueError(
            f"`{name}` (of shape {tuple(x.shape)}) must hold unit vectors, as torch.nn.functional.normalize(x, dim=-1) "
            f"makes them; {len(wrong)} of {len(lengths)} rows that were looked at have lengths from {min(wrong):.3g} "
            f"to {max(wrong):.3g}"
        )
    if x.device.type != "cpu":
        _lengths_known.add(key)
