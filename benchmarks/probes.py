"""`python -m benchmarks probes`: attentive probes, clusters and robustness of the networks on the photographs."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks import results
from benchmarks.evidence.summary import mean_and_error, select, table
from benchmarks.marked_tables import filled
from data.images import load_images
from evaluate import evaluate
from evaluators.linear.robustness import RobustnessOptions
from evaluators.prototypes.clustering import ClusteringOptions
from evaluators.request import ExtractOptions, Request, Weights

DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"
SPLIT = "test"
PIXELS, UNTRAINED, PLAIN, VMF = "raw pixels", "before training", "DINO", "DINO-vMF"
ARMS: dict[str, tuple[str, Weights]] = {
    PIXELS: ("vmf-probability", "pixels"),
    UNTRAINED: ("vmf-probability", "random"),
    PLAIN: ("none-logit", "teacher"),
    VMF: ("vmf-probability", "teacher"),
}
"""The run of the ablation that each arm is, and which of its features."""
MANY = 100
"""Clusters of k-means beside the number of classes: about as many prototypes as DINO-vMF uses."""


def probes(
    *, runs: Path = Path("runs/ablation"), seeds: tuple[int, ...] = (0, 1, 2), output: Path = Path("runs/probes")
) -> None:
    """Evaluate the runs of `ablation.py --recipe photos_dino_vmf`, and put the tables into docs/evaluation.md.

    Nothing is trained but probes, and nothing is written into the runs. Interrupted, it goes on where it stopped.

    Args:
        runs: output directory of the ablation.
        seeds: of the runs.
        output: folder of the corrupted photographs, and of the rows so far, probes.jsonl.
    """
    torch.set_num_threads(1)
    corrupted = output / "corrupted"
    corrupt(corrupted)
    path = output / "probes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["arm"], row["seed"]) for row in rows}
    for seed in seeds:
        for arm, (name, features) in ARMS.items():
            if (arm, seed) in done or (arm == PIXELS and seed != seeds[0]):  # which are the same in every run
                continue
            start = time.process_time()
            where = output / f"{name}-{features}-seed{seed}"
            request = Request(
                str(runs / f"{name}-seed{seed}"), features, SPLIT, output=where, extract=ExtractOptions(num_workers=0)
            )
            row = {"arm": arm, "seed": seed} | {metric: number for metric, number in measure(request, corrupted)}
            row["cpu_seconds"] = round(time.process_time() - start, 1)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            rows.append(row)
    print(results.write("probes", "cpu", [row for row in rows if row["seed"] in seeds]))
    DOCS.write_text(rendered(DOCS.read_text()))


def measure(request: Request, corrupted: Path) -> Iterator[tuple[str, float]]:
    """Every number of the protocols by PROTOCOL METRIC."""
    options: dict[str, Any] = {
        "clustering": ClusteringOptions(clusters=(MANY,)),
        "robustness": RobustnessOptions(sets=(f"C={corrupted}",)),
    }
    for protocol, settings in (options if request.features == "pixels" else {"attentive": None} | options).items():
        for row in evaluate(request, protocol, settings):
            yield f"{protocol} {row['metric']}", row["value"]
            if row["metric"] == "nmi_prototypes":
                yield "prototypes", row["clusters"]


def corrupt(folder: Path) -> None:
    """Write corrupted copies of the test cells to FOLDER/CORRUPTION/SEVERITY/CLASS, as ImageNet-C is laid out.

    Noise has a deviation of 10 to 50 of 255, blur a radius of 0.5 to 2.5 px; contrast falls to 0.7 and then to 0.1, and
    the JPEGs have a quality of 50 to 3. These are not ImageNet-C's corruptions.
    """
    images, rng = load_images("photos", SPLIT), np.random.default_rng(0)
    for severity in range(1, 6):
        for number, (image, label) in enumerate(images):
            x = np.asarray(image, float)
            made = {
                "noise": x + rng.normal(0, 10 * severity, x.shape),
                "blur": np.asarray(image.filter(ImageFilter.GaussianBlur(severity / 2)), float),
                "contrast": x.mean() + (x - x.mean()) * (0.85 - 0.15 * severity),
            }
            for name, pixels in made.items():
                path = folder / name / str(severity) / images.classes[label] / f"{number:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(path)
            path = folder / "jpeg" / str(severity) / images.classes[label] / f"{number:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=(50, 25, 12, 6, 3)[severity - 1])


def rendered(page: str) -> str:
    """`page` with the tables of the newest results between its markers."""
    return filled(page, lambda name: TABLES[name](results.latest("probes")), group="probes")


def _attentive(result: dict[str, Any]) -> str:
    columns = {"linear probe on [CLS], %": "robustness top1", "attentive probe on the patches, %": "attentive top1"}
    return _table(result, columns)


def _clusters(result: dict[str, Any]) -> str:
    kinds = {
        "14 clusters": "kmeans",
        f"{MANY} clusters": f"kmeans@{MANY}",
        "prototypes": "prototypes",
        "as many clusters": "kmeans@prototypes",
    }
    columns = {}
    for title, kind in kinds.items():
        columns |= {"prototypes in use": "prototypes"} if kind == "prototypes" else {}
        columns |= {f"{measure.upper()}, {title}": f"clustering {measure}_{kind}" for measure in ("nmi", "ari")}
    return _table(result, columns)


def _robust(result: dict[str, Any]) -> str:
    corruptions = [name.partition("/")[2] for name in result["rows"][0] if name.startswith("robustness top1@C/")]
    columns = {"clean, %": "robustness top1"}
    columns |= {name: f"robustness top1@C/{name}" for name in corruptions} | {"mean": "robustness top1@C"}
    return _table(result, columns)


TABLES = {"attentive": _attentive, "clusters": _clusters, "robust": _robust}


def _table(result: dict[str, Any], columns: dict[str, str]) -> str:
    lines = []
    for arm in ARMS:
        found = select(result["rows"], arm=arm)
        cells = [
            _cell([row.get(name) for row in found], 1 if name == "prototypes" else 100) for name in columns.values()
        ]
        lines.append([arm, str(len(found)) if len(found) > 1 else "", *cells])
    where = f"{result['device']}, 1 thread, torch {result['versions']['torch']}, {result['date']}"
    head = ("", "seeds", *columns)
    return f"{table(head, lines)}\n\n({where}; `benchmarks/results`, `python -m benchmarks probes`.)"


def _cell(values: list[float | None], scale: float) -> str:
    found = mean_and_error([None if value is None else scale * value for value in values])
    if found is None:
        return "–"
    return f"{found[0]:.1f}" + (f" ± {found[1]:.1f}" if len(values) > 1 else "")
