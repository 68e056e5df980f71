"""The command `evaluate.py compare`: raw pixels, random networks and runs on the same images, and what that says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

from evaluators.protocol import Evaluation, Metric
from evaluators.registry import PROTOCOLS
from evaluators.request import ExtractOptions, Request, open_evaluation
from reporting.own_tables import COMPARE, difference_row
from reporting.recording import run_protocol
from reporting.rows import RESULTS, make_rows, markdown_table, read_predictions
from reporting.several_runs.comparison import PIXELS, RANDOM, Model, differences, sentence, table
from runtime.distributed import is_main
from storage.json_lines import append_rows


@dataclasses.dataclass(frozen=True)
class Comparing:
    """Raw pixels, a random network and any number of runs on the same images, with paired standard errors."""

    runs: tyro.conf.Positional[tuple[str, ...]]
    """Output directories of pretrain.py; with --output, other checkpoints, too."""
    split: Literal["val", "test"] = "val"
    """The split whose accuracies are compared; settings (k, C) are chosen on val."""
    data: Path | None = None
    """Folder of images or name of a set of the hub, in place of the first run's own."""
    dataset: Literal["photos", "digits", "folder", "hub"] | None = None
    """Kind of data set, as for the other commands."""
    protocols: tuple[Literal["knn", "linear"], ...] = ("knn", "linear")
    """What is compared; a linear probe on pixels takes minutes where there are many images or classes."""
    output: Path | None = None
    """Folder of what is written; by default that of each run, and of the first run for the comparison."""
    extract: ExtractOptions = dataclasses.field(default_factory=ExtractOptions)
    debug: bool = False
    """Show the traceback of an error."""


def compare(asked: Comparing) -> str:
    """Evaluate what is compared; return its table in Markdown and, in words, what beats what. Call it on all ranks.

    The main rank writes compare.md, appends the differences to the runs' results.jsonl, and writes their pages again.

    Raises ValueError where the runs are not of the same images, or no run is named.
    """
    if not asked.runs or not asked.protocols or len(set(asked.runs)) < len(asked.runs):
        raise ValueError(f"`runs` (={asked.runs}) must be different ones, at least one, and `protocols` not empty")
    requests = [
        Request(
            run, split=asked.split, data=asked.data, dataset=asked.dataset, output=asked.output, extract=asked.extract
        )
        for run in asked.runs
    ]
    names = [Path(run).resolve().name for run in asked.runs]
    names = names if len(set(names)) == len(names) else list(asked.runs)
    opened = [open_evaluation(request) for request in requests]
    labels = opened[0].features(asked.split).labels
    for evaluation in opened[1:]:  # before the evaluations, which take minutes
        if not np.array_equal(evaluation.features(asked.split).labels, labels):
            raise ValueError(f"`runs` (={asked.runs}) must be of the same images: name them with --data")
    models = [
        Model(name, _correct(open_evaluation(request), request, asked, labels))
        for name, request in _baselines(names, requests, opened).items()
    ]
    for name, request, evaluation in zip(names, requests, opened, strict=True):
        models.append(Model(name, _correct(evaluation, request, asked, labels), pretrained=True))
    return _write(models, asked, opened, len(labels)) if is_main() else ""


def _baselines(names: Sequence[str], requests: Sequence[Request], opened: Sequence[Evaluation]) -> dict[str, Request]:
    # Raw pixels have the size of the first run's images. Runs of one architecture share the first one's random network.
    found, shapes = {PIXELS: dataclasses.replace(requests[0], features="pixels")}, []
    for name, request, evaluation in zip(names, requests, opened, strict=True):
        shape: Any = evaluation.encoder and evaluation.encoder.model.config.to_diff_dict()
        if shape not in shapes:
            label = f"{RANDOM} like {name}" if shapes else RANDOM
            found[label] = dataclasses.replace(request, features="random")
            shapes.append(shape)
    return found


def _correct(evaluation: Evaluation, request: Request, asked: Comparing, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return by protocol which images are classified right, on the main rank."""
    correct = {}
    for protocol in asked.protocols:
        run_protocol(protocol, evaluation, PROTOCOLS[protocol].options(), request)
        if is_main():
            correct[protocol] = read_predictions(evaluation.output, protocol, request.features, asked.split) == labels
    return correct


def _write(models: Sequence[Model], asked: Comparing, opened: Sequence[Evaluation], images: int) -> str:
    from reporting.evaluation_page import write_page_again  # imported here because single protocols draw nothing

    found, data = differences(models), str(opened[0].data or opened[0].dataset)
    pretrained = [model.name for model in models if model.pretrained]
    for name, run, evaluation in zip(pretrained, asked.runs, opened, strict=True):
        metrics = [Metric(*difference_row(difference)) for difference in found if difference.a == name]
        common = {"protocol": COMPARE, "features": "teacher", "split": asked.split, "data": data, "n": images}
        append_rows(evaluation.output / RESULTS, make_rows(metrics, checkpoint=run, **common))
        write_page_again(evaluation.output, run)
    said = [
        markdown_table(table(models)),
        f"On {images} {asked.split} images of {Path(data).name}. ±: standard errors over the images, paired by image "
        "where they are of differences.",
        "\n".join(f"- {sentence(difference)}" for difference in found),
    ]
    text = "\n\n".join(said)
    (opened[0].output / "compare.md").write_text(f"{text}\n", encoding="utf-8")
    return text
