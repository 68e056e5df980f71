"""The benchmarks by the names of `python -m benchmarks NAME`, all but `gpu`; together they import all there is."""

import sys
from pathlib import Path

# The examples are scripts: their folder is what Python puts first when one of them is run.
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "vit_ssl"))

from benchmarks.augment import augment
from benchmarks.concentration import concentration
from benchmarks.distinct import distinct
from benchmarks.evidence import evidence
from benchmarks.fashion import fashion, fashion_folder, fashion_stability
from benchmarks.faults import faults
from benchmarks.fuzz.command import fuzz
from benchmarks.loss import loss
from benchmarks.matrix import matrix
from benchmarks.mixture import mixture
from benchmarks.mixture_fit import mixture_fit
from benchmarks.normalizer import normalizer
from benchmarks.ood import ood
from benchmarks.photos import photos
from benchmarks.probes import probes
from benchmarks.rank_faults import rank_faults
from benchmarks.scale import scale
from benchmarks.segmentation import photo_scenes, segmentation
from benchmarks.small_recipes import small_recipes
from benchmarks.split_folder import split_folder
from benchmarks.step import step
from benchmarks.warm_start import warm_start

COMMANDS = {
    "normalizer": normalizer,
    "loss": loss,
    "augment": augment,
    "step": step,
    "mixture": mixture,
    "fashion": fashion,
    "fashion-stability": fashion_stability,
    "fashion-folder": fashion_folder,
    "small-recipes": small_recipes,
    "photos": photos,
    "probes": probes,
    "photo-scenes": photo_scenes,
    "segmentation": segmentation,
    "distinct": distinct,
    "split-folder": split_folder,
    "evidence": evidence,
    "concentration": concentration,
    "mixture-fit": mixture_fit,
    "warm-start": warm_start,
    "ood": ood,
    "faults": faults,
    "scale": scale,
    "rank-faults": rank_faults,
    "fuzz": fuzz,
    "matrix": matrix,
}
