"""`python -m benchmarks segmentation`: networks of seeds.py on scenes of photographs, and the table of the page."""

from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks import results
from benchmarks.evidence.summary import select, table, text
from benchmarks.marked_tables import filled
from benchmarks.segmentation.scenes import SIDE, photo_scenes
from evaluate import evaluate
from evaluators.dense.segmentation.segmentation import SegmentationOptions
from evaluators.request import ExtractOptions, Request, Weights
from reporting.rows import read_results

DOCS = Path(__file__).parents[2] / "docs" / "evaluation.md"
PIXELS, UNTRAINED = "raw pixels", "before training"
ARMS: dict[str, tuple[str, Weights]] = {
    PIXELS: ("photos_dino", "pixels"),
    UNTRAINED: ("photos_dino", "random"),
    "DINO": ("photos_dino", "teacher"),
    "DINO-vMF": ("photos_dino_vmf", "teacher"),
    "iBOT": ("photos_ibot", "teacher"),
    "iBOT-vMF": ("photos_ibot_vmf", "teacher"),
}
"""By the row of the table: the recipe, and what of its run is evaluated. All recipes have one network."""
METHODS = {"knn": "patch kNN", "linear": "linear head"}


def segmentation(
    *,
    runs: Path = Path("runs/seeds"),
    seeds: tuple[int, ...] = (0, 1, 2),
    split: Literal["val", "test"] = "test",
    output: Path = Path("runs/segmentation"),
) -> None:
    """Evaluate runs of `seeds.py --recipes photos_dino photos_dino_vmf photos_ibot photos_ibot_vmf` on photo-scenes.

    Writes benchmarks/results/segmentation_cpu_*.json and the table of docs/evaluation.md. Nothing is trained.
    Interrupted, it goes on where it stopped.

    Args:
        runs: output directory of seeds.py.
        seeds: those to evaluate.
        split: of the scenes.
        output: folder of the scenes and of the results so far.
    """
    torch.set_num_threads(1)
    scenes = output / "scenes"
    if not scenes.exists():
        scenes.parent.mkdir(parents=True, exist_ok=True)
        photo_scenes(scenes)
    rows = []
    for seed in seeds:
        for arm, (recipe, features) in ARMS.items():
            if arm != PIXELS or seed == seeds[0]:
                run = f"{recipe}-seed{seed}"
                rows.append({"arm": arm, "seed": seed} | _measured(runs / run, features, split, scenes, output / run))
    print(results.write("segmentation", "cpu", rows, split=split))
    DOCS.write_text(rendered(DOCS.read_text()))


def _measured(
    run: Path, features: Weights, split: Literal["val", "test"], scenes: Path, output: Path
) -> dict[str, Any]:
    """Numbers by metric, and the strength that was chosen; evaluated where they are missing."""
    wanted = ("segmentation", features, split)
    rows = [
        row for row in read_results(output) if (row["protocol"], row["features"], row["split"]) == wanted
    ] or evaluate(
        Request(str(run), features, split, scenes, output=output, extract=ExtractOptions(image_size=SIDE)),
        "segmentation",
        SegmentationOptions(num_workers=0),
    )
    return {row["metric"]: row["value"] for row in rows} | {"C": rows[-1]["C"], "seconds": rows[-1]["seconds"]}


def rendered(page: str) -> str:
    """`page` with the table of the newest results between its markers."""
    return filled(page, lambda _: _table(results.latest("segmentation")), group="segmentation")


def _table(result: dict[str, Any]) -> str:
    rows = result["rows"]
    untrained = {row["seed"]: row for row in select(rows, arm=UNTRAINED)}
    lines = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = select(rows, arm=arm)
        cells = [arm, "" if arm == PIXELS else str(len(own))]
        for method in METHODS:
            miou, accuracy = f"{method}_mIoU", f"{method}_pixel_accuracy"
            gain = [row[miou] - untrained[row["seed"]][miou] for row in own if arm not in (PIXELS, UNTRAINED)]
            cells.append(text([row[miou] for row in own], scale=100, digits=1))
            cells.append(text(gain, scale=100, digits=1, signed=True) if gain else "")
            cells.append(text([row[accuracy] for row in own], scale=100, digits=1))
        lines.append(cells)
    header = ["", "seeds"]
    columns = ("mIoU, %", "gain", "pixels right, %")
    header += [f"{method}: {column}" for method in METHODS.values() for column in columns]
    where = f"{result['device']}, 1 thread, torch {result['versions']['torch']}, {result['date']}"
    return f"{table(header, lines)}\n\n({where}; `benchmarks/results`, `python -m benchmarks segmentation`.)"
