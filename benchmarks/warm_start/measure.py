"""What is measured of a pretraining that goes on."""

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from data.images import Images
from data.loading import load_steps
from evaluate import evaluate
from evaluators.features.encoder import as_encoder
from evaluators.features.extraction import Extraction, features_of
from evaluators.request import Request
from methods.method import Method
from reporting.rows import read_results
from training.log import METRICS
from vmf_heads import prototype_report
from vmf_heads.head import find_head

BATCHES = 8
"""The loss before the first step is a mean over so many batches."""
PARTS = 12
"""Of the steps, for the picture."""


@torch.no_grad()
def use(method: Method, name: str) -> dict[str, float]:
    """How many prototypes are the most probable one, at the student's temperature, of some training image; and kappa.

    BatchNorm in the head takes the statistics of these images, as it does in training.
    """
    network, tau = method.teacher, method.recipe.student_temp
    encoder = as_encoder(network.backbone, name, image_size=method.recipe.image_size)
    features = torch.from_numpy(features_of(Extraction(encoder, name, None, encoder.image_size))("train").x)
    head = find_head(network).train()
    report = prototype_report(head, head.features(features), temperature=tau)
    return {"used": report.used, "unique": report.unique[0.9], "kappa": report.kappa["p50"]}


@torch.no_grad()
def at_the_start(method: Method, images: Images, output: Path) -> dict[str, float]:
    """The loss of the first batches of the training, without a step."""
    method.train().attach()
    loaded = load_steps(images, method.recipe, 0, 0, BATCHES, output, accumulate=1, num_workers=0)
    losses = [method(batch, 0, commit=False)[0].item() for (batch,) in loaded]
    return {"loss_before": statistics.fmean(losses)}


def knn(run: Path) -> float:
    """The accuracy of kNN with the teacher's backbone on the test split; evaluated once."""
    rows = [row for row in read_results(run) if (row["protocol"], row["split"]) == ("knn", "test")]
    return (rows or evaluate(Request(str(run), split="test"), "knn"))[-1]["value"]


def over_time(run: Path) -> dict[str, list[Any]]:
    """Means over parts of the training of the loss and of the prototypes that a step's targets use."""
    rows = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    ends = [round(len(rows) * part / PARTS) for part in range(PARTS + 1)]
    parts = [rows[first:end] for first, end in itertools.pairwise(ends) if end > first]
    return {
        "steps": [part[-1]["step"] for part in parts],
        **{
            f"{key}_over_time": [round(statistics.fmean(row[key] for row in part), 4) for part in parts]
            for key in ("loss", "prototypes_used")
        },
    }
