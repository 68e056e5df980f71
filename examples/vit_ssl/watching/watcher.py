"""A look at the teacher's features every few epochs, which leaves the training as it is."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from config.recipe import Recipe
from data.images import Images
from data.stream import ImageStream
from evaluators.knn import predict
from evaluators.protocol import Features
from methods.backbone import features as features_of_backbone
from methods.method import Method
from runtime.distributed import device, is_main
from training.parallel import unwrap
from training.run import random_backbone
from watching.measures import alpha_req, feature_std, lidar, rankme, ridge_top1
from watching.sample import draw_sample, features, features_of_views

NEIGHBOURS = 20


class Watcher:
    """Measures the teacher's [CLS] features on a fixed sample of images, on a copy of its backbone.

    The networks that train are only read, and no random number is drawn from a generator of theirs: losses are bit for
    bit those of a run that nobody watches. Every process must make one, and call it at the same steps.

    Args:
        images: the train images of the run.
        recipe: of the run.
        data: where the images are, as for `load_images`.
        every: epochs between looks.

    Raises ValueError when the images are a stream, of which none can be drawn.
    """

    def __init__(self, images: Images | ImageStream, recipe: Recipe, data: Path | None, *, every: int) -> None:
        if isinstance(images, ImageStream):
            raise ValueError(f"`watch` (={every}) must be 0 with `dataset` 'stream', of which no sample can be drawn")
        self.recipe, self.every = recipe, every
        self.sample = draw_sample(images, recipe, data)
        self._backbone = random_backbone(recipe, device())
        self._looks, self._seconds, self._start = 0, 0.0, time.perf_counter()

    def due(self, step: int, steps_per_epoch: int, last_step: int) -> bool:
        """Return whether to look after this step: the first, the last, and that of every so many epochs."""
        return step in (1, last_step) or step % (self.every * steps_per_epoch) == 0

    def look(self, method: Method) -> dict[str, float]:
        """Return the measures as columns of metrics.jsonl, on the main process; the others help and return {}.

        `knn_top1` and `linear_top1` where there are validation images with labels, `rankme`, `lidar`, `alpha_req`,
        `feature_std`. What is not defined, as of features that are all alike, is left out.
        """
        with self._clock(), torch.random.fork_rng(devices=[]):  # a DataLoader draws from the global generator
            found = self._measure(method)
        self._looks += 1
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def draw(self, output: Path, *, refresh: bool) -> None:
        """Write OUTPUT/curves.html anew; with `refresh` it says that the run goes on."""
        with self._clock():
            from watching.curves import write_curves  # imported here because matplotlib takes half a second

            write_curves(output, self.recipe.name, refresh=refresh)

    def plan(self) -> str:
        """Return what is looked at, in a line for a person."""
        bank, val = self.sample.bank, self.sample.val
        if val is None:
            return f"watched on {len(bank)} train images; without validation images of several classes there is no kNN"
        return f"watched on {len(bank)} train and {len(val)} validation images"

    def cost(self) -> str:
        """Return how long the looks and pages took until now, in a line for a person."""
        whole = time.perf_counter() - self._start
        return f"watched: {self._looks} looks took {self._seconds:.1f} s, {self._seconds / whole:.1%} of the time"

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def _measure(self, method: Method) -> dict[str, float]:
        self._copy_weights(method)
        bank = features(self.sample.bank, self._encode, self.recipe)
        views = features_of_views(self.sample.viewed, self._encode, self.recipe)
        val = features(self.sample.val, self._encode, self.recipe) if self.sample.val else None
        readable = len(bank.x) > 1 and len(views) > 1
        if not readable:  # the training itself tells of images that cannot be read
            return {}
        found = self._accuracies(bank, val) if val is not None and len(val.x) else {}
        if is_main():
            found |= {"rankme": rankme(bank.x), "lidar": lidar(views)}
            found |= {"alpha_req": alpha_req(bank.x), "feature_std": feature_std(bank.x)}
        return found

    def _accuracies(self, bank: Features, val: Features) -> dict[str, float]:
        nearest = predict(bank, val, (NEIGHBOURS,))[NEIGHBOURS]  # on every process, as they share the queries
        knn = float((nearest == val.labels).mean())
        return {"knn_top1": knn, "linear_top1": ridge_top1(bank, val)} if is_main() else {}

    @torch.no_grad()
    def _copy_weights(self, method: Method) -> None:
        # A copy, so that no hook of DDP, FSDP2 or torch.compile sees these images. Under FSDP2 every process gathers
        # each weight.
        state = unwrap(method.teacher).backbone.state_dict()
        whole = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in state.items()}
        whole.pop("embeddings.mask_token", None)  # iBOT's, which only pretraining needs
        self._backbone.load_state_dict(whole)

    def _encode(self, images: Tensor) -> Tensor:
        return features_of_backbone(self._backbone, images)
