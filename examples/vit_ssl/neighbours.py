"""What a run finds alike: for each query the nearest images of the train split, beside those by raw pixels.

    python examples/vit_ssl/neighbours.py runs/mine                     an image of each class of val
    python examples/vit_ssl/neighbours.py runs/mine shoe.jpg bag.jpg    image files of yours

prints their names and draws them in one picture, RUN/neighbours.png. Near means a large cosine of the features that kNN
is evaluated with; those that an evaluation has left in RUN/features are used again.
"""

from __future__ import annotations

from runtime.ending import sound_ending

import dataclasses
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

from data.augment import EvalTransform
from data.files import open_rgb
from data.images import load_images, share_kept
from data.unreadable import name_of, readable
from evaluators.knn import nearest_neighbours
from evaluators.protocol import Evaluation
from evaluators.request import Request, open_evaluation
from reporting.pictures import Tile, contact_sheet, pick_queries
from runtime.distributed import device
from training.checkpoint_file import CHECKPOINT


def main(
    run: tyro.conf.Positional[Path],
    queries: tyro.conf.Positional[tuple[Path, ...]] = (),
    data: Path | None = None,
    count: int = 5,
    output: Path | None = None,
    debug: bool = False,
) -> None:
    """Print and draw the nearest neighbours of images, by the features of a run and by raw pixels.

    Args:
        run: output directory of pretrain.py.
        queries: image files; by default an image of each class of the val split, of ten classes at most.
        data: folder of images, in place of the run's own; its train split is searched.
        count: neighbours of each query.
        output: the picture, by default RUN/neighbours.png.
        debug: show the traceback of an error.
    """
    if not (run / CHECKPOINT).is_file():
        raise FileNotFoundError(f"`run` (={str(run)!r}) must be an output directory of pretrain.py with a {CHECKPOINT}")
    request = Request(str(run), data=data)
    ours, pixels = open_evaluation(request), open_evaluation(dataclasses.replace(request, features="pixels"))
    train = load_images(ours.dataset or "", "train", data=ours.data)
    if len(ours.features("train").labels) < len(train):
        train = readable(train)
    if not 1 <= count <= len(train):
        raise ValueError(f"`count` (={count}) must be in 1 ... {len(train)}, the number of images that are searched")

    if queries:
        names, images, labels = [path.name for path in queries], [open_rgb(path) for path in queries], None
    else:
        val = load_images(ours.dataset or "", "val", data=ours.data)
        drawn = pick_queries(val.labels, 10)
        names, images, labels = [name_of(val, i) for i in drawn], [val[i][0] for i in drawn], val.labels[drawn, None]
    size = ours.run.recipe.image_size
    transform = EvalTransform(size, keep=share_kept(ours.dataset or "", size))
    batch = torch.stack([transform(image) for image in images])
    found = {run.resolve().name: nearest(ours, batch, count), "raw pixels": nearest(pixels, batch, count)}

    for name, row in zip(names, next(iter(found.values())), strict=True):
        print(f"{name}: {', '.join(name_of(train, index) for index in row)}")
    rows = [[[Tile(image)]] for image in images]
    for model, of_model in found.items():
        other = np.zeros(of_model.shape, bool) if labels is None else train.labels[of_model] != labels
        if labels is not None:
            print(f"{model}: {other.size - other.sum()} of {other.size} neighbours are of their query's class")
        for row, indices, framed in zip(rows, of_model, other, strict=True):
            row.append([Tile(train[index][0], bool(frame)) for index, frame in zip(indices, framed, strict=True)])
    path = output or run / "neighbours.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(["query", *found], list(zip(names, rows, strict=True))).save(path, optimize=True)
    print(f"picture: {path}")


@torch.inference_mode()
def nearest(evaluation: Evaluation, batch: Tensor, count: int) -> np.ndarray:
    """Return the numbers (B, count) of the train images nearest to those of a batch (B, 3, h, w), nearest first."""
    encoder, bank = evaluation.encoder, evaluation.features("train").x
    features = batch.flatten(1) if encoder is None else encoder.cls(batch.to(device()))
    ((_, found),) = nearest_neighbours(bank, [features.cpu().numpy()], count)
    return found.cpu().numpy()


if __name__ == "__main__":
    with sound_ending():
        tyro.cli(main)
