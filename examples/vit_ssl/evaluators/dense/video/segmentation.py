"""Video object segmentation on DAVIS-2017 with frozen patch features (section 5.3), as in DINO's evaluation."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from evaluators.dense.video.davis import TREE, Video, load_davis, read_annotation
from evaluators.dense.video.masks import segment, write_masks
from evaluators.dense.video.metrics import boundary_accuracy, region_similarity, summarize
from evaluators.protocol import Evaluation, Metric, NotApplicable
from runtime.distributed import is_main
from runtime.shares import gather, share

if TYPE_CHECKING:
    from evaluators.features.encoder import Encoder


@dataclass(frozen=True)
class VideoOptions:
    """DAVIS-2017, semi-supervised: the first frame's objects are given and found again in the later ones."""

    image_set: str = "val"
    """The list of sequences, ImageSets/2017/IMAGE_SET.txt of --data; its annotations must be public."""
    side: int = 480
    """Shorter side of the frames in px."""
    last_frames: int = 7
    """How many frames before the present one give labels, beside the first."""
    radius: int = 12
    """How many rows and columns of patches away a label may come from; 0: from anywhere."""
    topk: int = 5
    """How many patches give their labels to one."""
    temperature: float = 0.1
    """Temperature of the softmax over the cosines of these patches."""
    write_masks: bool = False
    """Write the masks to OUTPUT/davis2017/SEQUENCE/*.png, where the official evaluation can read them."""

    def __post_init__(self) -> None:
        for name, low in (("side", 1), ("last_frames", 0), ("radius", 0), ("topk", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name}` (={getattr(self, name)}) must be at least {low}")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` (={self.temperature}) must be positive")


def video_segmentation(evaluation: Evaluation, options: VideoOptions = VideoOptions()) -> Iterator[Metric]:
    """Yield the official numbers, see `metrics.summarize`: J and F of every object between the first and last
    frame.

    Their means for every object are written to OUTPUT/davis2017-IMAGE_SET.csv. Nothing is tuned, so `evaluation.split`
    does not matter. The ranks divide the sequences.

    Raises:
        NotApplicable: no patch tokens, or a data folder that is not DAVIS.
        FileNotFoundError, OSError, ValueError: files are missing or damaged, with the layout that is expected.
    """
    if evaluation.encoder is None or not evaluation.encoder.has_patches:
        raise NotApplicable("video segmentation needs the patch tokens of a vision transformer")
    if evaluation.data is None or not (evaluation.data / "ImageSets").is_dir():
        given = "`data` (=None)" if evaluation.data is None else f"`data` (={str(evaluation.data)!r})"
        raise NotApplicable(f"{given} is not the folder of DAVIS: {TREE}")
    settings = {name: getattr(options, name) for name in ("side", "last_frames", "radius", "topk", "temperature")}
    videos = load_davis(evaluation.data, options.image_set)
    folder = evaluation.output / "davis2017" if options.write_masks else None
    mininterval = 0.1 if sys.stderr.isatty() else 5  # a log file keeps every line
    bar = tqdm(share(videos), "DAVIS", unit="sequence", leave=False, mininterval=mininterval, disable=not is_main())
    scores = gather([_evaluate(evaluation.encoder, video, settings, folder) for video in bar])
    if is_main():
        _write_objects(evaluation.output / f"davis2017-{options.image_set}.csv", videos, scores)
    objects = [of_object for of_video in scores for of_object in of_video]
    notes = {"n": len(objects), "split": options.image_set, "sequences": len(videos), **settings}
    for name, value in summarize(objects).items():
        yield Metric(name, value, notes)


def _evaluate(encoder: Encoder, video: Video, settings: dict[str, Any], folder: Path | None) -> np.ndarray:
    masks = segment(encoder, video, **settings)
    if folder:
        write_masks(folder / video.name, video, masks)
    return score(video, masks)


def score(video: Video, masks: list[np.ndarray]) -> np.ndarray:
    """Return J and F of every object in every frame between the first and the last: (objects, 2, frames - 2).

    `masks` are those of `segment`, uint8 (H, W) per frame, the first of them the annotation.

    Raises:
        ValueError: an annotation has another size than its frame.
    """
    scores = np.empty((masks[0].max(), 2, len(masks) - 2))
    for frame, (path, mask) in enumerate(zip(video.annotations[1:-1], masks[1:-1], strict=True)):
        truth = np.asarray(read_annotation(path))
        if truth.shape != mask.shape:
            size = f"{mask.shape[1]} x {mask.shape[0]} px"
            raise ValueError(f"the annotation {str(path)!r} must be {size} like the first one")
        for index in range(len(scores)):
            found, wanted = mask == index + 1, truth == index + 1
            scores[index, :, frame] = region_similarity(found, wanted), boundary_accuracy(found, wanted)
    return scores


def _write_objects(path: Path, videos: list[Video], scores: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["Sequence", "J-Mean", "F-Mean"])
        for video, of_video in zip(videos, scores, strict=True):
            for number, means in enumerate(of_video.mean(axis=2), start=1):
                table.writerow([f"{video.name}_{number}", *(f"{mean:.4f}" for mean in means)])
