"""The videos of DAVIS-2017 in the layout of their release."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from data.augment import to_tensor
from data.files import open_image

TREE = (
    "expected DATA/JPEGImages/480p/SEQUENCE/*.jpg, DATA/Annotations/480p/SEQUENCE/*.png and "
    "DATA/ImageSets/2017/{train,val}.txt with a SEQUENCE per line"
)
VOID = 255
"""Label of pixels that belong to nothing; they count as background, as in the official semi-supervised evaluation."""


@dataclass(frozen=True)
class Video:
    """One sequence: the files of its frames and of their annotations, in the order of time."""

    name: str
    frames: list[Path]
    annotations: list[Path]


def load_davis(data: Path, image_set: str = "val") -> list[Video]:
    """Return the sequences that `data`/ImageSets/2017/`image_set`.txt names, in its order.

    Raises:
        FileNotFoundError: the list is missing or empty, or a sequence lacks its frames or the annotation of one.
        ValueError: a name is a path, or a sequence has no frame between its first and its last, none to be scored.
    """
    listing = data / "ImageSets" / "2017" / f"{image_set}.txt"
    if not listing.is_file():
        raise FileNotFoundError(f"`data` (={str(data)!r}) has no {listing.relative_to(data)}: {TREE}")
    names = listing.read_text("utf-8", errors="replace").split()
    if not names:
        raise FileNotFoundError(f"{str(listing)!r} names no sequence: {TREE}")
    for name in names:  # masks are written to a folder of that name
        if not re.fullmatch(r"[\w.-]{1,200}", name) or not name.strip("."):
            raise ValueError(f"{str(listing)!r} must name folders of JPEGImages/480p, not {name[:200]!r}: {TREE}")
    return [_video(data, name) for name in names]


def _video(data: Path, name: str) -> Video:
    frames = sorted((data / "JPEGImages" / "480p" / name).glob("*.jpg"))
    if not frames:
        raise FileNotFoundError(f"`data` (={str(data)!r}) has no frames of the sequence {name!r}: {TREE}")
    if len(frames) < 3:
        raise ValueError(f"the sequence {name!r} must have at least 3 frames, as the first and last are not scored")
    annotations = [data / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
    missing = [path for path in annotations if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(frames)} frames of the sequence {name!r} lack their annotation, "
            f"first {str(missing[0])!r}: {TREE}"
        )
    return Video(name, frames, annotations)


def frame_size(size: tuple[int, int], side: int, patch_size: int) -> tuple[int, int]:
    """Return (width, height) at which a frame of `size` (width, height) is encoded, both multiples of the patch size.

    The shorter side is `side`, the longer one keeps the aspect ratio and is rounded down to a multiple of 64, as in
    DINO; both are rounded down further where the patch size asks for it.

    Raises:
        ValueError: nothing is left of a side.
    """
    step = 64 if 64 % patch_size == 0 else patch_size
    short, long = side // patch_size * patch_size, side * max(size) // min(size) // step * step
    if not short or not long:
        raise ValueError(f"`side` (={side}) leaves nothing of a frame of {size[0]} x {size[1]} px")
    return (short, long) if size[1] > size[0] else (long, short)


def read_frame(path: Path, side: int, patch_size: int, size: tuple[int, int]) -> Tensor:
    """Return a frame as a normalised tensor (3, height, width), resized as `frame_size` says: bilinear, without
    antialiasing.

    Raises:
        OSError: the file is no image or damaged.
        ValueError: the frame is not of `size` (width, height), that of the annotations.
    """
    image = open_image(path).convert("RGB")
    if image.size != size:
        raise ValueError(f"the frame {str(path)!r} must be {size[0]} x {size[1]} px like its annotations")
    width, height = frame_size(size, side, patch_size)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, size=(height, width), mode="bilinear", align_corners=False)[0].round()
    return to_tensor(Image.fromarray(pixels.byte().permute(1, 2, 0).numpy()))


def read_annotation(path: Path) -> Image.Image:
    """Return an annotation with its palette: 0 is background, 1, 2, ... are objects; void has become background.

    Raises:
        OSError: the file is no image or damaged.
        ValueError: the image holds colours instead of the numbers of objects.
    """
    image = open_image(path)
    if image.mode not in ("P", "L"):
        raise ValueError(f"the annotation {str(path)!r} has mode {image.mode}, but must be an indexed PNG (P or L)")
    return image.point(lambda label: 0 if label == VOID else label)
