"""The features of a data set: extracted once, on all ranks, and kept on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.augment import EvalTransform
from data.images import Images, load_images, share_kept
from evaluators.features import feature_cache
from evaluators.features.encoder import Encoder
from evaluators.protocol import Features, FeaturesOf, NotApplicable
from runtime.distributed import is_main, on_main, rank, world_size
from runtime.interruption import leave_process_group

KINDS = ("cls", "last4", "cls+mean_patch", "patches")
OF_PATCHES = ("cls+mean_patch", "patches")


@dataclass(frozen=True)
class Extraction:
    """The settings by which the features of a data set are made."""

    encoder: Encoder | None  # None: raw pixels
    dataset: str  # a name that `data.images.load_images` knows
    data: Path | None
    image_size: int  # px
    device: torch.device | str = "cpu"
    cache: Path | None = None  # folder of the features that are kept; None: none are
    half: bool = False  # kept and handed out as float16
    batch_size: int = 256  # per rank
    num_workers: int = 0
    keep: float | None = None  # of the shorter side, the share that is cropped; None: as `kept` says

    @property
    def kept(self) -> float:
        """The share of the shorter side that is cropped: all of a library set, 224 of 256 px of other images."""
        return self.keep or share_kept(self.dataset, self.image_size)


class Chunk(NamedTuple):
    """Consecutive images of a split: features (n, D) of those that can be read, which of the m can, and the errors."""

    x: np.ndarray
    readable: np.ndarray
    errors: list[str]


def features_of(extraction: Extraction) -> FeaturesOf:
    """Return the function that protocols call, `features(split, kind="cls")`; call it on all ranks or on none.

    Raises ValueError for an unknown kind, or when not a single image can be read.
    """

    @cache
    def features(split: str, kind: str = "cls") -> Features:
        if kind not in KINDS:
            raise ValueError(f"`kind` (={kind!r}) must be one of {', '.join(KINDS)}")
        if kind in OF_PATCHES and extraction.encoder and not extraction.encoder.has_patches:
            raise NotApplicable(f"features of the kind {kind!r} need a backbone with patch tokens")
        images = load_images(extraction.dataset, split, data=extraction.data)
        if is_main() and images.notes:
            print("\n  ".join([f"{images.split} images of {extraction.data}:", *images.notes]), file=sys.stderr)
        keep = extraction.kept
        encoder = extraction.encoder

        def encode_batch(batch: Tensor) -> Tensor:
            return batch.flatten(1) if encoder is None else encode(encoder, batch, [kind])[kind]

        chunks = partial(
            extract,
            encode_batch,
            images,
            EvalTransform(extraction.image_size, keep=keep),
            device=extraction.device,
            half=extraction.half,
            batch_size=extraction.batch_size,
            num_workers=extraction.num_workers,
        )
        if extraction.cache is None:
            found, errors = assemble(chunks(), images)
        else:
            model = encoder.model if encoder else None
            settings = {"kind": kind, "size": extraction.image_size, "keep": keep, "half": extraction.half}
            key = feature_cache.fingerprint(model, images, settings | {"data": str(extraction.data)})
            folder = extraction.cache / f"{split}-{kind}-{key}"
            if not on_main(lambda: feature_cache.is_whole(folder)):
                _store(folder, chunks(), images)
            found, errors = feature_cache.load(folder)
        report_unreadable(images, errors)
        return found

    return features


def encode(encoder: Encoder, images: Tensor, kinds: Iterable[str]) -> dict[str, Tensor]:
    """Return the features of several kinds from one pass: images (B, 3, h, w) -> kind: (B, D).

    Where a backbone has fewer than four blocks, "last4" are all of them.
    """
    layers = encoder.layers(images, min(4, encoder.depth) if "last4" in kinds else 1)
    cls = layers[-1][:, 0]
    made: dict[str, Callable[[], Tensor]] = {
        "cls": lambda: cls,
        "last4": lambda: torch.cat([tokens[:, 0] for tokens in layers], dim=1),
        "cls+mean_patch": lambda: torch.cat([cls, layers[-1][:, 1:].mean(dim=1)], dim=1),
        "patches": lambda: layers[-1][:, 1:].flatten(1),
    }
    return {kind: made[kind]() for kind in kinds}


@torch.inference_mode()
def extract(
    encode: Callable[[Tensor], Tensor],
    images: Images,
    transform: Callable[[Any], Tensor],
    *,
    device: torch.device | str = "cpu",
    half: bool = False,
    batch_size: int = 256,
    num_workers: int = 0,
    quiet: bool = False,
) -> Iterator[Chunk]:
    """Apply `encode`, batches (B, 3, h, w) -> (B, D), to a split; the chunks come in the order of its images.

    Every rank reads and encodes every `world_size()`-th batch and yields all of them, float32 or float16. `quiet` shows
    no progress.
    """
    batches = [range(first, min(first + batch_size, len(images))) for first in range(0, len(images), batch_size)]
    loader = DataLoader(
        Readable(_Transformed(images, transform)),
        batch_sampler=batches[rank() :: world_size()],
        collate_fn=collate,
        num_workers=num_workers,
        worker_init_fn=leave_process_group,
        pin_memory=torch.cuda.is_available(),
    )
    mine = iter(loader)
    rounds = range(0, len(batches), world_size())
    shown = {"leave": False, "disable": quiet or not is_main(), "mininterval": 0.1 if sys.stderr.isatty() else 5}
    for first in tqdm(rounds, desc=f"features of {images.split}", unit="batch", **shown):
        chunk = None
        if first + rank() < len(batches):
            batch, readable, errors = next(mine)
            x = encode(batch.to(device, non_blocking=True)).float().cpu().numpy() if len(batch) else np.empty((0, 0))
            chunk = Chunk(x.astype(np.float16) if half else x, readable, errors)
        for part in _all_gather(chunk):
            if part is not None:
                yield part


def assemble(chunks: Iterator[Chunk], images: Images) -> tuple[Features, list[str]]:
    """Return the features of all chunks in memory, and what is wrong with the images that are missing."""
    parts = list(chunks)
    readable = np.concatenate([part.readable for part in parts])
    x = np.concatenate([part.x for part in parts if len(part.x)]) if readable.any() else np.empty((0, 0), np.float32)
    return Features(x, images.labels[readable], images.classes), [error for part in parts for error in part.errors]


class Split(Protocol):
    """Images, or what else is read of a split: how many there are of which."""

    split: str

    def __len__(self) -> int: ...


def report_unreadable(images: Split, errors: list[str], *, shown: int = 20) -> None:
    """Say which images are left out. Raises ValueError when that is every one."""
    if len(errors) == len(images):
        raise ValueError(f"none of the {len(images)} images of the {images.split} split can be read; {errors[0]}")
    if errors and is_main():
        more = [f"... and {len(errors) - shown} more"] if len(errors) > shown else []
        lines = [f"{len(errors)} of {len(images)} {images.split} images are left out:", *errors[:shown], *more]
        print("\n  ".join(lines), file=sys.stderr)


class Readable(Dataset):
    """Items of another dataset, or what is wrong with them as text; `collate` makes batches of them."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> Tensor | str:
        """Return the item, or the text of its OSError."""
        try:
            return self.dataset[index]
        except OSError as error:
            return str(error)


def collate(items: list[Tensor | str]) -> tuple[Tensor, np.ndarray, list[str]]:
    """Return the n tensors of m items as (n, ...), which of the m are tensors, and the texts of the others."""
    tensors = [item for item in items if isinstance(item, Tensor)]
    errors = [item for item in items if isinstance(item, str)]
    readable = np.array([isinstance(item, Tensor) for item in items], bool)
    return torch.stack(tensors) if tensors else torch.empty(0), readable, errors


class _Transformed(Dataset):
    def __init__(self, images: Images, transform: Callable[[Any], Tensor]) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> Tensor:
        return self.transform(self.images[index][0])


def _store(folder: Path, chunks: Iterator[Chunk], images: Images) -> None:
    if is_main():
        feature_cache.store(folder, chunks, images.labels, images.classes)
    else:
        for _ in chunks:  # what this rank encodes goes to the main one
            pass
    if dist.is_initialized():
        dist.barrier()


def _all_gather(chunk: Chunk | None) -> list[Chunk | None]:
    if not dist.is_initialized():
        return [chunk]
    parts: list[Chunk | None] = [None] * world_size()
    dist.all_gather_object(parts, chunk)
    return parts
