"""The masks of a video's objects, from those of its first frame and a frozen backbone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluators.dense.video.davis import Video, frame_size, read_annotation, read_frame
from evaluators.dense.video.label_propagation import track, upsample

if TYPE_CHECKING:
    from evaluators.features.encoder import Encoder


@torch.inference_mode()
def segment(encoder: Encoder, video: Video, *, side: int = 480, **settings: Any) -> list[np.ndarray]:
    """Return the number of the object at every pixel of every frame, uint8 (H, W) each; the first is the annotation.

    `side` is the shorter side at which frames are encoded, in px, `settings` are those of `track`.

    Raises:
        OSError, ValueError: a file is damaged, the frames differ in size, or nothing is annotated in the first one.
    """
    annotation = read_annotation(video.annotations[0])
    labels = np.asarray(annotation)
    if not labels.any():
        raise ValueError(f"the annotation {str(video.annotations[0])!r} must show an object")
    width, height = frame_size(annotation.size, side, encoder.patch_size)
    small = annotation.resize((width // encoder.patch_size, height // encoder.patch_size), Image.Resampling.NEAREST)
    one_hot = F.one_hot(torch.from_numpy(np.array(small)).long(), int(labels.max()) + 1).float()
    masks = [labels]
    for soft in track(_features(encoder, video, side, annotation.size), one_hot.to(encoder.model.device), **settings):
        found = Image.fromarray(upsample(soft, (height, width)).byte().cpu().numpy())
        masks.append(np.asarray(found.resize(annotation.size, Image.Resampling.NEAREST)))
    return masks


def _features(encoder: Encoder, video: Video, side: int, size: tuple[int, int]) -> Iterator[Tensor]:
    for path in video.frames:
        frame = read_frame(path, side, encoder.patch_size, size)
        yield encoder.patches(frame[None].to(encoder.model.device))[0]


def write_masks(folder: Path, video: Video, masks: list[np.ndarray]) -> None:
    """Write one indexed PNG per frame, named as its annotation and with the palette of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    palette = read_annotation(video.annotations[0]).getpalette()
    for path, mask in zip(video.annotations, masks, strict=True):
        image = Image.fromarray(mask)
        if palette:
            image.putpalette(palette)
        image.save(folder / path.name)
