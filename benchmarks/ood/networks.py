"""The networks that are compared, as features of images and the mixture of the head."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.fashion import data as fashion
from benchmarks.fashion.evaluate import features
from benchmarks.fashion.run import ARMS, BANK
from benchmarks.fashion.train import Settings, train
from benchmarks.ood.images import CLOTHING, PHOTOGRAPHS, as_tensors, out_sets, pictures
from data.augment import EvalTransform
from data.images import load_images
from evaluators.features.encoder import as_encoder
from evaluators.ood.density import OwnMixture, own_mixture
from evaluators.protocol import Features
from evaluators.prototypes.components import of_run
from training.run import load_run, random_backbone
from vmf_heads.mixture import VMFMixture

PLAIN, VMF, UNTRAINED = "DINO", "DINO-vMF", "untrained"
CELLS = {PLAIN: "none, logit", VMF: "vMF, responsibilities"}
"""The cells of Table 1 that the arms are."""
RUNS = {PLAIN: "none-logit", VMF: "vmf-probability"}
"""The runs of ablation.py that they are."""


@dataclass(frozen=True)
class Seen:
    """What a network makes of images: of the data, of other sets, and the mixture of its head, where it was trained."""

    train: Features
    test: Features
    outside: dict[str, np.ndarray]
    own: OwnMixture | None


def photograph_networks(runs: Path, arm: str, seed: int, clothing: dict[str, fashion.Images]) -> Seen:
    """A vision transformer pretrained on the photographs by ablation.py, or as that run begins."""
    run = load_run(runs / f"{RUNS[VMF if arm == UNTRAINED else arm]}-seed{seed}")
    backbone = random_backbone(run.recipe) if arm == UNTRAINED else run.backbone
    size = run.recipe.image_size
    encoder, transform = as_encoder(backbone, arm, image_size=size), EvalTransform(size)

    @torch.inference_mode()
    def encode(images: Sequence[Image.Image]) -> np.ndarray:
        batches = (images[first : first + 256] for first in range(0, len(images), 256))
        return torch.cat([encoder.cls(torch.stack([*map(transform, batch)])) for batch in batches]).numpy()

    splits = {name: load_images("photos", name) for name in ("train", "test")}
    train_set, test_set = (Features(encode(pictures(s)), s.labels, s.classes) for s in splits.values())
    outside = {name: encode(images) for name, images in out_sets(PHOTOGRAPHS, clothing).items()}
    return Seen(train_set, test_set, outside, None if arm == UNTRAINED else own_mixture(of_run(run)))


def clothing_networks(
    settings: Callable[..., Settings], arm: str, seed: int, clothing: dict[str, fashion.Images]
) -> Seen:
    """A small convolutional network trained on Fashion-MNIST as `python -m benchmarks fashion` does, or untrained."""
    bank = fashion.Images(clothing["train"].x[:BANK], clothing["train"].labels[:BANK])
    options = {"steps": 0} if arm == UNTRAINED else ARMS[CELLS[arm]]
    trained = train(settings(**options), clothing["train"], seed)
    teacher = trained.teacher.eval().requires_grad_(False)
    classes = [str(label) for label in range(10)]
    train_set, test_set = (
        Features(features(teacher.backbone, images.x).numpy(), images.labels.numpy(), classes)
        for images in (bank, clothing["test"])
    )
    outside = {
        name: features(teacher.backbone, as_tensors(images)).numpy()
        for name, images in out_sets(CLOTHING, clothing).items()
    }
    mixture = VMFMixture.from_head(teacher.head, trained.loss.student_temp)
    own = None if arm == UNTRAINED else OwnMixture(mixture, teacher.head.features)
    return Seen(train_set, test_set, outside, own)
