"""What the command line asks for, and the `Evaluation` that it becomes."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data.images import LIBRARY_SETS
from data.source.kept import read_source
from evaluators.features.encoder import Encoder, as_encoder, open_encoder, reinitialized
from evaluators.features.extraction import Extraction, features_of
from evaluators.protocol import Evaluation, Features, FeaturesOf, NotApplicable
from runtime.distributed import device, world_size
from training.checkpoint_file import CHECKPOINT

if TYPE_CHECKING:
    from training.run import Run

Weights = Literal["teacher", "random", "pixels"]


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    """How images become features."""

    image_size: int | None = None
    """Side in px; by default that of the checkpoint."""
    cache: bool = True
    """Keep the features in OUTPUT/features/, except those of the small sets that come with libraries."""
    half: bool = False
    """Keep them as float16: 2 GB in place of 4 for ImageNet's train split and a ViT-B."""
    batch_size: int = 256
    """Images at a time, on every rank."""
    num_workers: int | None = None
    """Processes that read images, for every rank; by default the cores divided by the ranks, and none for the small
    sets that come with libraries."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is evaluated, and on what."""

    checkpoint: str
    """Output directory of pretrain.py, AutoModel folder or hub name, timm:NAME, or .pth file of DINO, iBOT, MSN, DINOv2
    or DINOv3."""
    features: Weights = "teacher"
    """The checkpoint's weights, random ones (for a run: those before its first step), or raw pixels."""
    split: Literal["val", "test"] = "val"
    """The split whose results are reported; settings (k, C, learning rates) are chosen on val in either case."""
    data: Path | None = None
    """Folder of images, or name of a set of the hub, in place of the run's own images; retrieval, video
    and segmentation take folders of their own kind."""
    dataset: Literal["photos", "digits", "folder", "hub"] | None = None
    """Kind of data set: by default the run's own; with --data folder, or hub for a run on images of the hub."""
    output: Path | None = None
    """Folder of results.jsonl and whatever else protocols write; by default the run's directory."""
    key: str = "teacher"
    """Which network of a .pth file."""
    heads: int | None = None
    """Attention heads of the network in a .pth file, where its width is none of a published model's."""
    extract: ExtractOptions = dataclasses.field(default_factory=ExtractOptions)
    debug: bool = False
    """Show the traceback of an error."""


def open_evaluation(request: Request) -> Evaluation:
    """Open the checkpoint; images are read when a protocol asks for features.

    Raises ValueError for a setting that is out of range or without a meaning here, FileNotFoundError for a folder
    that is not there.
    """
    _check(request)
    run = _open_run(Path(request.checkpoint))
    if run and not request.data and run.recipe.dataset not in LIBRARY_SETS:
        kept = read_source(Path(request.checkpoint)).data
        if kept and (kept.is_dir() or not kept.is_absolute()):  # not a folder that is gone
            request = dataclasses.replace(request, data=kept)
    if run:
        encoder = as_encoder(run.backbone, request.checkpoint, image_size=run.recipe.image_size)
    else:
        encoder = open_encoder(request.checkpoint, device(), key=request.key, heads=request.heads)
    output = request.output or (Path(request.checkpoint) if run else None)
    if output is None:
        raise ValueError(
            "`output` (=None) must be a folder for the results, as the checkpoint is no run of pretrain.py"
        )
    if size := request.extract.image_size:
        if size % encoder.patch_size:
            raise ValueError(f"`image_size` (={size}) must be a multiple of the patch size, {encoder.patch_size}")
        encoder = dataclasses.replace(encoder, image_size=size)
    dataset = _dataset(request, run)
    chosen = _choose(encoder, request.features, run)
    features, elsewhere = _no_features, None
    if dataset is not None:
        extraction = _extraction(request.extract, chosen, dataset, request.data, encoder.image_size, output)
        features = features_of(extraction)

        def elsewhere(name: str, data: Path | None, *, whole: bool = False) -> FeaturesOf:
            other = _extraction(request.extract, chosen, name, data, encoder.image_size, output)
            return features_of(dataclasses.replace(other, keep=1.0 if whole else extraction.kept))

    # A run's head and centre belong to the weights they were trained with.
    own = run if request.features == "teacher" else None
    return Evaluation(chosen, features, request.split, request.data, own, output, dataset, elsewhere, encoder)


def _extraction(
    options: ExtractOptions, chosen: Encoder | None, dataset: str, data: Path | None, image_size: int, output: Path
) -> Extraction:
    in_library, workers = dataset in LIBRARY_SETS, options.num_workers
    return Extraction(
        chosen,
        dataset,
        data,
        image_size,
        device=device(),
        cache=output / "features" if options.cache and not in_library else None,
        half=options.half,
        batch_size=options.batch_size,
        num_workers=(0 if in_library else (os.cpu_count() or 1) // world_size()) if workers is None else workers,
    )


def _check(request: Request) -> None:
    for name, low in {"image_size": 1, "batch_size": 1, "num_workers": 0}.items():
        value = getattr(request.extract, name)
        if value is not None and value < low:
            raise ValueError(f"`{name}` (={value}) must be at least {low}")
    for name, default in {"key": "teacher", "heads": None}.items():
        value = getattr(request, name)
        if value != default and not Path(request.checkpoint).is_file():
            raise ValueError(f"`{name}` (={value!r}) is only for .pth files, which {request.checkpoint!r} is not")
        if name == "heads" and value is not None and value < 1:
            raise ValueError(f"`heads` (={value}) must be at least 1")


def _open_run(directory: Path) -> Run | None:
    if not (directory / CHECKPOINT).is_file():
        return None
    from training.run import load_run  # imported here: other checkpoints are opened without the pretraining methods

    return load_run(directory, device())


def _dataset(request: Request, run: Run | None) -> str | None:
    own = run.recipe.dataset if run else None
    if request.dataset:
        return request.dataset
    if request.data:
        return "hub" if own in ("hub", "stream") else "folder"
    return own if own in LIBRARY_SETS else None


def make_features(run: Run, weights: Weights = "teacher") -> FeaturesOf:
    """Return the features of a run's own images, kept in memory alone."""
    encoder = as_encoder(run.backbone, run.recipe.name, image_size=run.recipe.image_size)
    chosen, where = _choose(encoder, weights, run), run.backbone.device
    return features_of(Extraction(chosen, run.recipe.dataset, None, encoder.image_size, where))


def _choose(encoder: Encoder, weights: Weights, run: Run | None) -> Encoder | None:
    if weights == "teacher":
        return encoder
    if weights == "pixels":
        return None
    if run is None:
        return reinitialized(encoder)
    from training.run import random_backbone  # imported here as in `_open_run`

    backbone = random_backbone(run.recipe, encoder.model.device)
    return as_encoder(backbone, encoder.source, image_size=encoder.image_size)


def _no_features(split: str, kind: str = "cls") -> Features:
    raise NotApplicable("it needs images: give --data DIR, or --dataset NAME")
